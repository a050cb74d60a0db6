"""Scanning a folder of deltas: what is fit to serve is found, the rest is skipped with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.format.deltas import write_small_delta
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.digest import generated_digest, sample_digest
from vllm_prinmix.format.schema import CONFIG_FILE, WEIGHTS_FILE
from vllm_prinmix.tenants import FIRST_ID, Tenant, check_files, scan, split_path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    return folder


@pytest.fixture
def deltas(tmp_path: Path, base: Path) -> Path:
    digest = sample_digest(Checkpoint(base))
    for seed, name in enumerate(("b", "a", "c")):
        write_small_delta(tmp_path / "deltas" / name, digest, seed)
    return tmp_path / "deltas"


def test_all_folders_are_tenants_in_order(deltas: Path, base: Path) -> None:
    tenants, skipped = scan(deltas, str(base), ["base"])
    assert [t.name for t in tenants] == ["a", "b", "c"]
    assert not skipped
    assert len({t.id for t in tenants}) == 3
    for tenant in tenants:
        assert FIRST_ID <= tenant.id < 2**31
        assert split_path(tenant.path) == (Path(tenant.folder), tenant.version)
        assert tenant.packed_bytes == (deltas / tenant.name / WEIGHTS_FILE).stat().st_size


def test_id_and_path_follow_name_and_content() -> None:
    tenant = Tenant("a", "/d/a", "111111111111", 1)
    assert tenant.id == Tenant("a", "/d/a", "111111111111", 1).id
    assert tenant.id != Tenant("a", "/d/a", "222222222222", 1).id
    assert tenant.id != Tenant("b", "/d/a", "111111111111", 1).id
    assert tenant.path != Tenant("a", "/d/a", "222222222222", 1).path


def test_bad_deltas_are_skipped_and_the_others_served(deltas: Path, base: Path) -> None:
    write_small_delta(deltas / "foreign", "sha256:another")
    (deltas / "empty").mkdir()
    (deltas / "notes.txt").write_text("not a folder")
    (deltas / ".hidden").mkdir()
    weights = deltas / "b" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-5])
    tenants, skipped = scan(deltas, str(base), ["base"])
    assert [t.name for t in tenants] == ["a", "c"]
    assert set(skipped) == {"foreign", "empty", "b"}
    assert "belongs to another base model" in str(skipped["foreign"])
    assert "sha256:another" in str(skipped["foreign"])
    assert "not a delta folder" in str(skipped["empty"])
    assert "truncated" in str(skipped["b"])


def test_a_tenant_may_not_hide_the_base(deltas: Path, base: Path) -> None:
    tenants, skipped = scan(deltas, str(base), ["a"])
    assert [t.name for t in tenants] == ["b", "c"]
    assert "name of the base" in str(skipped["a"])


def test_unfinished_compression_is_skipped(deltas: Path, base: Path) -> None:
    (deltas / "b").rename(deltas / "b.partial")
    _, skipped = scan(deltas, str(base), ["base"])
    assert "unfinished" in str(skipped["b.partial"])


def test_nothing_to_serve_is_an_error(tmp_path: Path, base: Path) -> None:
    with pytest.raises(PrinMixError, match="does not exist"):
        scan(tmp_path / "nowhere", str(base), [])
    (tmp_path / "deltas" / "x").mkdir(parents=True)
    with pytest.raises(PrinMixError, match="no servable delta.*x: not a delta folder"):
        scan(tmp_path / "deltas", str(base), [])


def test_files_that_change_after_start(deltas: Path, base: Path, tmp_path: Path) -> None:
    tenant = scan(deltas, str(base), [])[0][0]
    check_files(tenant)
    (deltas / "a").rename(tmp_path / "away")
    with pytest.raises(PrinMixError, match="does not exist"):
        check_files(tenant)
    write_small_delta(deltas / "a", seed=9)
    with pytest.raises(PrinMixError, match="replaced since the server started"):
        check_files(tenant)
    (deltas / "a" / CONFIG_FILE).unlink()
    with pytest.raises(PrinMixError, match="not a delta folder"):
        check_files(tenant)


def test_generated_deltas_and_bases_without_weights_belong_together(
    base: Path, deltas: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((base / "config.json").read_text())
    digest = generated_digest(Checkpoint(empty, weights=False))
    write_small_delta(deltas / "generated", digest, seed=9)
    tenants, skipped = scan(deltas, str(empty), ["base"], dummy=True)
    assert [t.name for t in tenants] == ["generated"]
    assert set(skipped) == {"a", "b", "c"}
    tenants, skipped = scan(deltas, str(base), ["base"])
    assert [t.name for t in tenants] == ["a", "b", "c"]
    assert "with --load-format dummy" in str(skipped["generated"])
