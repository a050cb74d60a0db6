"""The lazy checkpoint reader: what it finds, and what it says of broken folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import INDEX, SINGLE, Checkpoint

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b.weight": torch.linspace(-1, 1, 5, dtype=torch.float16),
    "c.weight": torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
}


def write_single(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    save_file(TENSORS, folder / SINGLE)


def write_sharded(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    weight_map = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        file = f"model-{i}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_names_shapes_dtypes_and_values(tmp_path: Path, write) -> None:
    write(tmp_path / "m")
    checkpoint = Checkpoint(tmp_path / "m")
    assert checkpoint.config == {"model_type": "qwen2"}
    assert {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()} == {
        "a.weight": ("BF16", (2, 3)),
        "b.weight": ("F16", (5,)),
        "c.weight": ("F32", (4, 2)),
    }
    for name, tensor in TENSORS.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
        assert torch.equal(checkpoint.load(name, torch.float32), tensor.float())


def test_chunks_are_the_tensor_bytes(tmp_path: Path) -> None:
    write_single(tmp_path)
    chunks = list(Checkpoint(tmp_path).chunks("c.weight", size=10))
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 2]
    assert b"".join(chunks) == TENSORS["c.weight"].numpy().tobytes()


def test_scanning_does_not_import_torch(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    code = (
        "import sys; from vllm_prinmix.format.checkpoint import Checkpoint; "
        f"assert len(Checkpoint({str(tmp_path)!r}).tensors) == 3; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_model_of_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--team--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_single(snapshot)
    refs = tmp_path / "hub" / "models--team--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert set(Checkpoint("team/model").tensors) == set(TENSORS)


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int):
    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: size if size >= 0 else len(data) + size])

    return cut


def edit_index(change):
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "adapter_config.json").write_text("{}")


BROKEN = {
    "no config": (write_single, drop("config.json"), "config.json is missing", ""),
    "config not JSON": (write_single, truncate("config.json", 5), "not valid JSON", "config.json"),
    "truncated": (write_single, truncate(SINGLE, -3), "truncated", SINGLE),
    "truncated in the header": (write_single, truncate(SINGLE, 20), "truncated", SINGLE),
    "empty file": (write_single, truncate(SINGLE, 0), "truncated", SINGLE),
    "missing shard": (write_sharded, drop("model-1.safetensors"), "shard .* missing", "model-1.safetensors"),
    "truncated shard": (write_sharded, truncate("model-2.safetensors", -1), "truncated", "model-2"),
    "index names another shard": (
        write_sharded,
        edit_index(lambda m: m.update({"b.weight": "model-0.safetensors"})),
        "no shard holds",
        "b.weight",
    ),
    "index names a tensor too many": (
        write_sharded,
        edit_index(lambda m: m.update({"x.weight": "model-1.safetensors"})),
        "no shard holds",
        "x.weight",
    ),
    "pickled": (write_single, pickled, "pickled", "pytorch_model.bin"),
    "adapter": (write_single, adapter, "an adapter, not .* --from-lora", ""),
    "no weights": (write_single, drop(SINGLE), "no weights", ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_named(tmp_path: Path, case: str) -> None:
    write, damage, message, named = BROKEN[case]
    write(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(PrinMixError, match=message) as caught:
        Checkpoint(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)
    assert named in str(caught.value)


def test_tensor_that_the_index_forgot(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"], "extra": torch.zeros(1)}, tmp_path / "model-0.safetensors")
    with pytest.raises(PrinMixError, match=r"extra is in a shard but the index does not say so"):
        Checkpoint(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(PrinMixError, match="no such checkpoint folder"):
        Checkpoint(tmp_path / "nothing")


def test_integers_cannot_be_loaded(tmp_path: Path) -> None:
    write_single(tmp_path)
    save_file({"q": torch.zeros(3, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(PrinMixError, match=r"dtype that is not supported.*I8"):
        Checkpoint(tmp_path).load("q")
