"""The delta folder: what is written is read, and whatever is wrong with it is said, never half used."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.format.deltas import write_small_delta
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format import delta as delta_files
from vllm_prinmix.format.delta import config_checksum, read_config, read_delta, version
from vllm_prinmix.format.schema import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_delta(tmp_path / "tenant")
    return tmp_path / "tenant"


def edit(folder: Path, **changes: object) -> None:
    """Change fields of the description and make its checksum fit again."""
    fields = json.loads((folder / CONFIG_FILE).read_text())
    fields.update(changes)
    fields["checksum"] = config_checksum(fields)
    (folder / CONFIG_FILE).write_text(json.dumps(fields))


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    written = write_small_delta(tmp_path / "again")
    delta = read_delta(tmp_path / "again")
    assert delta.config == written
    assert set(delta.tensors) == set(written.modules)
    assert torch.equal(delta.tensors["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))
    assert (folder / WEIGHTS_FILE).read_bytes() == (tmp_path / "again" / WEIGHTS_FILE).read_bytes()


def test_version_follows_the_content(folder: Path, tmp_path: Path) -> None:
    write_small_delta(tmp_path / "same")
    write_small_delta(tmp_path / "other", seed=1)
    assert version(folder) == version(tmp_path / "same") != version(tmp_path / "other")


def test_missing_folder_and_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrinMixError, match="does not exist"):
        read_delta(tmp_path / "nowhere")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(PrinMixError, match="cannot be read"):
        read_delta(folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(PrinMixError, match="not a delta folder"):
        read_delta(folder)


def test_truncated_weights(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-1])
    with pytest.raises(PrinMixError, match="truncated") as caught:
        read_delta(folder)
    assert f"found: {len(data) - 1} bytes" in str(caught.value)
    assert f"expected: {len(data)} bytes" in str(caught.value)
    assert str(folder / WEIGHTS_FILE) in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(["w", "c"]))
def test_every_flipped_bit_is_noticed(folder: Path, where: float, bit: int, name: str) -> None:
    path = folder / (WEIGHTS_FILE if name == "w" else CONFIG_FILE)
    good = path.read_bytes()
    at = int(where * len(good))
    damaged = bytearray(good)
    damaged[at] ^= 1 << bit
    try:
        path.write_bytes(damaged)
        if name == "c" and _same_json(good, bytes(damaged)):
            return  # a blank turned into another blank
        with pytest.raises(PrinMixError):
            read_delta(folder)
    finally:
        path.write_bytes(good)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_unknown_format_version(folder: Path) -> None:
    edit(folder, format_version=2)
    with pytest.raises(PrinMixError, match="unknown delta format version.*found: 2.*expected: 1"):
        read_config(folder)


@pytest.mark.parametrize("where", ["top", "module"])
def test_unknown_fields_are_an_error(folder: Path, where: str) -> None:
    if where == "top":
        edit(folder, extra=1)
    else:
        modules = json.loads((folder / CONFIG_FILE).read_text())["modules"]
        modules["model.norm.weight"]["rotation"] = "hadamard"
        edit(folder, modules=modules)
    with pytest.raises(PrinMixError, match="not valid.*(extra|rotation)"):
        read_config(folder)


def test_tensors_must_be_as_described(folder: Path) -> None:
    modules = json.loads((folder / CONFIG_FILE).read_text())["modules"]
    changed = json.loads(json.dumps(modules))
    changed["model.norm.weight"]["shape"] = [65]
    edit(folder, modules=changed)
    with pytest.raises(PrinMixError, match=r"not as described.*model\.norm\.weight"):
        read_delta(folder)
    del changed["model.norm.weight"]
    edit(folder, modules=changed)
    with pytest.raises(PrinMixError, match=r"different modules.*model\.norm\.weight"):
        read_delta(folder)


def test_not_json_and_not_an_object(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(PrinMixError, match="cannot be read"):
        read_config(folder)
    (folder / CONFIG_FILE).write_text("[1]")
    with pytest.raises(PrinMixError, match="not a JSON object"):
        read_config(folder)


def test_the_error_survives_pickling() -> None:
    import pickle

    error = PrinMixError("broken", where="here", found=1, expected=2, fix="mend it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error) == "broken [here]; found: 1; expected: 2; to fix: mend it"


def test_a_failed_write_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write_delta leaves the last word to its caller, which writes into a folder of another name."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(delta_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_small_delta(tmp_path / "tenant")
    assert not (tmp_path / "tenant" / CONFIG_FILE).exists()
