"""Scanning a folder of deltas: what is fit to serve is found, the rest is skipped with a reason."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.format.deltas import write_small_delta
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.delta import config_checksum, read_delta
from vllm_prinmix.format.digest import generated_digest, sample_digest
from vllm_prinmix.format.schema import CONFIG_FILE, WEIGHTS_FILE
from vllm_prinmix.tenants import FIRST_ID, Tenant, check_files, scan, split_path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {
        "model.norm.weight": torch.ones(64),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 64),
        "lm_head.weight": torch.zeros(8, 64),
    }
    save_file(tensors, folder / "model.safetensors")
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


@pytest.mark.parametrize("change", ["hollow", "lacking", "twice", "ghost", "shape"])
def test_every_tensor_of_the_base_is_accounted_for(base: Path, deltas: Path, change: str) -> None:
    """Otherwise the base's own weight would be served, in whole or in part, under a tenant's name."""
    path = deltas / "a" / CONFIG_FILE
    fields = json.loads(path.read_text())
    modules, unchanged = fields["modules"], fields["unchanged"]
    if change == "hollow":
        modules.clear()
        unchanged.clear()
    elif change == "lacking":
        del modules["model.norm.weight"]
    elif change == "twice":
        unchanged.append("model.norm.weight")
    elif change == "ghost":
        unchanged.append("model.layers.9.nothing.weight")
    else:
        modules["model.norm.weight"]["shape"] = [32]
    fields["checksum"] = config_checksum(fields)
    path.write_text(json.dumps(fields))
    tenants, skipped = scan(deltas, str(base), ["base"])
    assert [t.name for t in tenants] == ["b", "c"]
    reasons = {
        "hollow": "does not account for tensors of the base",
        "lacking": "does not account for tensors of the base.*model.norm.weight",
        "twice": "both stored and unchanged.*model.norm.weight",
        "ghost": "the base has no such tensors.*model.layers.9",
        "shape": "model.norm.weight has another shape",
    }
    assert re.search(reasons[change], str(skipped["a"]))


def test_no_folder_can_stop_the_others(base: Path, deltas: Path) -> None:
    shutil.copytree(deltas / "a", deltas / os.fsdecode(b"bad\xff"))
    (deltas / "nested").mkdir()
    (deltas / "fifo").mkdir()
    (deltas / "nested" / CONFIG_FILE).write_text("[" * 200_000)
    os.mkfifo(deltas / "fifo" / CONFIG_FILE)
    (deltas / "dangling").symlink_to(deltas / "nowhere")
    tenants, skipped = scan(deltas, str(base), ["base"])
    assert [t.name for t in tenants] == ["a", "b", "c"]
    assert set(skipped) == {"bad\\udcff", "nested", "fifo", "dangling"}


def test_a_lying_number_of_directions_costs_nothing(base: Path, deltas: Path) -> None:
    path = deltas / "a" / CONFIG_FILE
    fields = json.loads(path.read_text())
    fields["modules"]["model.layers.0.self_attn.q_proj.weight"]["classes"][0]["directions"] = 10**12
    fields["checksum"] = config_checksum(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(PrinMixError, match="not as described"):
        read_delta(deltas / "a")
