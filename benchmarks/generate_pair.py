"""A base and a fine-tune with random weights, in the shape of a model's first layers: material for timing.

What a compression's time and error depend on is like an LLM's: the change of every linear has singular
values that fall by a power law, inputs have few strong directions and some loud channels, all is in bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.generate_delta import Shape, write_base
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, layer_prefix
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import INDEX

DECAY = 0.6  # singular values of the change: (1 + i/4)^-DECAY
CHANGE = 0.03  # its size, relative to the weight's
VARIETY = 512  # strong directions among the embeddings
LOUD = 1 / 128  # share of channels that the norms make ten times louder


def generate_pair(
    folder: Path,
    shape: Shape,
    layers: int,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    tell: Callable[[int], None] = lambda layer: None,
) -> tuple[Path, Path]:
    """Write ``folder``/base and ``folder``/finetuned with the first ``layers`` layers of ``shape``.

    Embeddings are tied and the same in both (one file, linked), so that only linears change. One layer is in
    memory at a time, a file each. The same seed and kind of device give the same weights. ``tell`` hears how
    many layers are written. Raises PrinMixError where the disk has no room.
    """
    shape = replace(shape, num_hidden_layers=layers, tie_word_embeddings=True)
    base, finetuned = folder / "base", folder / "finetuned"
    for side in (base, finetuned):
        write_base(side, shape)
    expected = expected_tensors(build_model(AutoConfig.from_pretrained(base)))
    needed = 2 * sum(2 * torch.Size(size).numel() for _, size in expected.values())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PrinMixError(
            "the disk has no room for the generated pair",
            where=folder,
            found=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB",
            fix="give fewer --layers, or another --out",
        )
    random = torch.Generator(device or "cpu").manual_seed(seed)
    index: dict[str, str] = {}
    for layer in range(-1, layers):  # -1: what belongs to no layer
        names = [
            n for n in expected if n.startswith(layer_prefix(layer)) or (layer < 0 and ".layers." not in n)
        ]
        old: dict[str, torch.Tensor] = {}
        new: dict[str, torch.Tensor] = {}
        for name in names:
            kind, size = expected[name]
            weight = _weight(name, kind, size, random)
            old[name] = weight.bfloat16().cpu()
            if kind is Kind.LINEAR:
                change = _power_law(size[0], size[1], min(size), random)
                weight += change * (CHANGE * weight.norm() / change.norm())
            new[name] = weight.bfloat16().cpu()
        file = f"layer-{layer:02}.safetensors" if layer >= 0 else "other.safetensors"
        index |= dict.fromkeys(names, file)
        save_file(old, base / file)
        if layer < 0:
            os.link(base / file, finetuned / file)
        else:
            save_file(new, finetuned / file)
            tell(layer + 1)
    for side in (base, finetuned):
        (side / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return base, finetuned


def _weight(name: str, kind: Kind, size: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """float32 weight of the base."""
    noise = torch.randn(size, generator=random, device=random.device)
    if kind is Kind.EMBEDDING:
        strong = _power_law(size[0], size[1], min(VARIETY, *size), random)
        return 0.02 * (strong / strong.std() + 0.1 * noise)
    if len(size) == 1:
        if not name.endswith("norm.weight"):
            return 0.02 * noise  # a bias
        loud = torch.rand(size, generator=random, device=random.device) < LOUD
        return 1 + 0.1 * noise + 9 * loud
    return noise * size[1] ** -0.5


def _power_law(rows: int, cols: int, rank: int, random: torch.Generator) -> torch.Tensor:
    """float32 [rows, cols] of ``rank`` nearly orthogonal random directions that fall off by a power law."""
    left = torch.randn(rows, rank, generator=random, device=random.device)
    right = torch.randn(rank, cols, generator=random, device=random.device)
    return (left * (1 + torch.arange(rank, device=random.device) / 4) ** -DECAY) @ right
