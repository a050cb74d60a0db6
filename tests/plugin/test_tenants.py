"""A folder of deltas: what is fit to serve is found, the rest skipped with a reason, changes are seen."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.format.deltas import write_small_delta
from vllm_prinmix.catalog import Catalog
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format import delta
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.delta import config_checksum, read_delta
from vllm_prinmix.format.digest import generated_digest, sample_digest
from vllm_prinmix.format.schema import CONFIG_FILE, WEIGHTS_FILE, DeltaConfig
from vllm_prinmix.tenants import FIRST_ID, Tenant, check_version, split_path


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
    found = Catalog(deltas, str(base), ["base"])
    assert list(found.tenants) == ["a", "b", "c"]
    assert not found.skipped
    assert len({t.id for t in found.tenants.values()}) == 3
    for tenant in found.tenants.values():
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
    found = Catalog(deltas, str(base), ["base"])
    assert list(found.tenants) == ["a", "c"]
    assert set(found.skipped) == {"foreign", "empty", "b"}
    assert "belongs to another base model" in found.skipped["foreign"]
    assert "sha256:another" in found.skipped["foreign"]
    assert "not a delta folder" in found.skipped["empty"]
    assert "truncated" in found.skipped["b"]


def test_a_tenant_may_not_hide_the_base(deltas: Path, base: Path) -> None:
    found = Catalog(deltas, str(base), ["a"])
    assert list(found.tenants) == ["b", "c"]
    assert "name of the base" in found.skipped["a"]


def test_unfinished_compression_is_skipped(deltas: Path, base: Path) -> None:
    (deltas / "b").rename(deltas / "b.partial")
    found = Catalog(deltas, str(base), ["base"])
    assert "unfinished" in found.skipped["b.partial"]


def test_nothing_to_serve_is_an_error(tmp_path: Path, base: Path) -> None:
    with pytest.raises(PrinMixError, match="does not exist"):
        Catalog(tmp_path / "nowhere", str(base), [])
    (tmp_path / "deltas" / "x").mkdir(parents=True)
    with pytest.raises(PrinMixError, match="no servable delta.*x: not a delta folder"):
        Catalog(tmp_path / "deltas", str(base), [])


def test_what_changes_in_the_folder_counts_at_once(deltas: Path, base: Path, tmp_path: Path) -> None:
    found = Catalog(deltas, str(base), [])
    before = found.lookup("a")
    assert before is not None
    assert found.lookup("a") is before
    (deltas / "a").rename(tmp_path / "away")
    assert found.lookup("a") is None
    assert "a" not in found.tenants
    write_small_delta(deltas / "a", found.digest, seed=9)
    after = found.lookup("a")
    assert after is not None
    assert after.version != before.version
    assert after.id != before.id
    with pytest.raises(PrinMixError, match="replaced after the request came.*send the request again"):
        check_version(deltas / "a", before.version)
    write_small_delta(deltas / "new", found.digest, seed=10)
    assert found.lookup("new") is not None
    assert list(Catalog(deltas, str(base), []).tenants) == ["a", "b", "c", "new"]


def test_a_link_may_point_to_another_delta(deltas: Path, base: Path, tmp_path: Path) -> None:
    """How a new version of a fine-tune is put in place at one stroke."""
    (deltas / "live").symlink_to(deltas / "a")
    found = Catalog(deltas, str(base), [])
    first = found.lookup("live")
    (tmp_path / "next").symlink_to(deltas / "b")
    (tmp_path / "next").rename(deltas / "live")
    second = found.lookup("live")
    assert first is not None
    assert second is not None
    assert (Path(first.folder).name, Path(second.folder).name) == ("a", "b")


@pytest.mark.parametrize("known", [True, False])
def test_a_link_that_turns_meanwhile(
    deltas: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """What is found is one delta, whole, not the description of one and the weights of another."""
    found = Catalog(deltas, str(base), [])
    (deltas / "live").symlink_to(deltas / "a")
    if known:
        found.lookup("live")
    check = delta.check_weights_size

    def check_and_turn(folder: Path, config: DeltaConfig) -> Path:
        (tmp_path / "next").symlink_to(deltas / ("b" if (deltas / "live").resolve().name == "a" else "a"))
        (tmp_path / "next").rename(deltas / "live")
        return check(folder, config)

    monkeypatch.setattr(delta, "check_weights_size", check_and_turn)
    for _ in range(4):
        tenant = found.lookup("live")
        assert tenant is not None
        assert tenant.version == delta.version(Path(tenant.folder))


def test_a_broken_tenant_is_known_until_it_is_mended(deltas: Path, base: Path) -> None:
    found = Catalog(deltas, str(base), [])
    weights = deltas / "a" / WEIGHTS_FILE
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    with pytest.raises(PrinMixError, match="truncated"):
        found.lookup("a")
    assert "a" in found.tenants
    weights.write_bytes(good)
    assert found.lookup("a") is found.tenants["a"]
    write_small_delta(deltas / "foreign", "sha256:another")
    with pytest.raises(PrinMixError, match="another base"):
        found.lookup("foreign")
    assert "another base" in found.skipped["foreign"]
    assert "foreign" not in found.tenants


def test_no_tenant_is_forgotten_while_the_folder_is_away(deltas: Path, base: Path, tmp_path: Path) -> None:
    """A network disk that is not mounted for a moment."""
    found = Catalog(deltas, str(base), [])
    deltas.rename(tmp_path / "away")
    with pytest.raises(PrinMixError, match="the folder of deltas is gone"):
        found.lookup("a")
    with pytest.raises(FileNotFoundError):
        found.refresh()
    (tmp_path / "away").rename(deltas)
    assert found.lookup("a") is found.tenants["a"]


def test_refresh_lists_what_is_there_now(deltas: Path, base: Path) -> None:
    found = Catalog(deltas, str(base), [])
    shutil.rmtree(deltas / "a")
    write_small_delta(deltas / "d", found.digest, seed=4)
    (deltas / "empty").mkdir()
    found.refresh()
    assert sorted(found.tenants) == ["b", "c", "d"]
    assert set(found.skipped) == {"empty"}
    shutil.rmtree(deltas / "empty")
    found.refresh()
    assert not found.skipped


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "../deltas/a", "a/../a", "/etc", "a\0", "x" * 5000, "a/", "\udcff"]
)
def test_a_name_is_no_path(deltas: Path, base: Path, name: str) -> None:
    write_small_delta(deltas / ".hidden", sample_digest(Checkpoint(base)))
    assert Catalog(deltas, str(base), []).lookup(name) is None


def test_generated_deltas_and_bases_without_weights_belong_together(
    base: Path, deltas: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((base / "config.json").read_text())
    digest = generated_digest(Checkpoint(empty, weights=False))
    write_small_delta(deltas / "generated", digest, seed=9)
    found = Catalog(deltas, str(empty), ["base"], dummy=True)
    assert list(found.tenants) == ["generated"]
    assert set(found.skipped) == {"a", "b", "c"}
    found = Catalog(deltas, str(base), ["base"])
    assert list(found.tenants) == ["a", "b", "c"]
    assert "with --load-format dummy" in found.skipped["generated"]


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
    found = Catalog(deltas, str(base), ["base"])
    assert list(found.tenants) == ["b", "c"]
    reasons = {
        "hollow": "does not account for tensors of the base",
        "lacking": "does not account for tensors of the base.*model.norm.weight",
        "twice": "both stored and unchanged.*model.norm.weight",
        "ghost": "the base has no such tensors.*model.layers.9",
        "shape": "model.norm.weight has another shape",
    }
    assert re.search(reasons[change], found.skipped["a"])


def test_no_folder_can_stop_the_others(base: Path, deltas: Path) -> None:
    shutil.copytree(deltas / "a", deltas / os.fsdecode(b"bad\xff"))
    (deltas / "nested").mkdir()
    (deltas / "fifo").mkdir()
    (deltas / "nested" / CONFIG_FILE).write_text("[" * 200_000)
    os.mkfifo(deltas / "fifo" / CONFIG_FILE)
    (deltas / "dangling").symlink_to(deltas / "nowhere")
    found = Catalog(deltas, str(base), ["base"])
    assert list(found.tenants) == ["a", "b", "c"]
    assert set(found.skipped) == {"bad\\udcff", "nested", "fifo", "dangling"}


def test_a_lying_number_of_directions_costs_nothing(base: Path, deltas: Path) -> None:
    path = deltas / "a" / CONFIG_FILE
    fields = json.loads(path.read_text())
    fields["modules"]["model.layers.0.self_attn.q_proj.weight"]["classes"][0]["directions"] = 10**12
    fields["checksum"] = config_checksum(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(PrinMixError, match="not as described"):
        read_delta(deltas / "a")
