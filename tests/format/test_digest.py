"""Digests: the same for every sharding, another one for every change that they are meant to see."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_prinmix.format.checkpoint import INDEX, SINGLE, Checkpoint
from vllm_prinmix.format.digest import content_digest, sample_digest


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "small": torch.randn(3, 5, generator=generator),
        "large": torch.randn(200, 300, generator=generator).bfloat16(),
    }


def write(folder: Path, content: dict[str, torch.Tensor], sharded: bool = False) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if not sharded:
        save_file(content, folder / SINGLE)
        return Checkpoint(folder)
    weight_map = {}
    for i, name in enumerate(reversed(content)):
        weight_map[name] = f"model-{i}.safetensors"
        save_file({name: content[name]}, folder / weight_map[name])
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint(folder)


def flip(content: dict[str, torch.Tensor], name: str, byte: int) -> dict[str, torch.Tensor]:
    content[name].view(torch.uint8).view(-1)[byte] ^= 1
    return content


@pytest.mark.parametrize("digest", [content_digest, sample_digest])
def test_sharding_does_not_matter(tmp_path: Path, digest) -> None:
    single = digest(write(tmp_path / "single", tensors()))
    assert single == digest(write(tmp_path / "sharded", tensors(), sharded=True))
    assert single.startswith("sha256:")
    assert len(single) == 7 + 64


@pytest.mark.parametrize("digest", [content_digest, sample_digest])
@pytest.mark.parametrize(
    "change",
    [
        lambda c: {"other": c.pop("small"), **c},
        lambda c: c | {"small": c["small"].view(5, 3)},
        lambda c: c | {"small": c["small"].view(torch.float16).view(3, 10)},
        lambda c: c | {"more": torch.zeros(1)},
        lambda c: {"large": c["large"]},
        lambda c: flip(c, "small", 7),
        lambda c: flip(c, "large", 0),
        lambda c: flip(c, "large", 2 * 200 * 300 - 1),
    ],
    ids=["name", "shape", "dtype", "more", "fewer", "byte", "first byte", "last byte"],
)
def test_changes_show(tmp_path: Path, digest, change) -> None:
    before = digest(write(tmp_path / "before", tensors()))
    assert before != digest(write(tmp_path / "after", change(tensors())))


def test_only_the_content_digest_sees_a_byte_between_the_pieces(tmp_path: Path) -> None:
    before = write(tmp_path / "before", tensors())
    after = write(tmp_path / "after", flip(tensors(), "large", 64 + 1))
    assert content_digest(before) != content_digest(after)
    assert sample_digest(before) == sample_digest(after)


@pytest.mark.parametrize("whole", [True, False])
def test_digest_is_what_the_definition_says(tmp_path: Path, whole: bool) -> None:
    lines = ""
    for name, tensor in sorted(tensors().items()):
        data = tensor.view(torch.uint8).numpy().tobytes()
        if not whole and len(data) > 4096:
            data = b"".join(data[(at := i * (len(data) - 64) // 63) : at + 64] for i in range(64))
        dtype = {"small": "F32", "large": "BF16"}[name]
        lines += f"{name} {dtype} {'x'.join(map(str, tensor.shape))} {hashlib.sha256(data).hexdigest()}\n"
    expected = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    checkpoint = write(tmp_path / "m", tensors())
    assert (content_digest if whole else sample_digest)(checkpoint) == expected


def test_visitor_sees_every_byte(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "m", tensors())
    seen: dict[str, bytes] = {}

    def visit(name: str, chunk: bytes) -> None:
        seen[name] = seen.get(name, b"") + chunk

    content_digest(checkpoint, visit)
    assert seen == {name: t.view(torch.uint8).numpy().tobytes() for name, t in tensors().items()}
