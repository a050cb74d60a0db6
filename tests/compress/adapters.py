"""LoRA adapters in PEFT's format, written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_prinmix.format.checkpoint import EMBEDDING, Checkpoint

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def write_adapter(
    folder: Path,
    base_folder: Path,
    *,
    targets: Sequence[str] = ALL,
    rank: int = 4,
    ranks: dict[str, int] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """An adapter of random factors for all modules that end in ``targets``; ``ranks`` by end of name.

    ``extra`` tensors are stored under PEFT's prefix, ``settings`` go to adapter_config.json.
    """
    folder.mkdir()
    base = Checkpoint(base_folder)
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for name, stored in base.tensors.items():
        module = name.removesuffix(".weight")
        if name == module or not any(module.endswith(f".{t}") or module == t for t in targets):
            continue
        rows, cols = stored.shape
        r = next((r for end, r in (ranks or {}).items() if module.endswith(end)), rank)
        a, b = "lora_A.weight", "lora_B.weight"
        if name == EMBEDDING:
            rows, cols, a, b = cols, rows, "lora_embedding_A", "lora_embedding_B"
        tensors[f"{PREFIX}{module}.{a}"] = torch.randn(r, cols, generator=random) * cols**-0.5
        tensors[f"{PREFIX}{module}.{b}"] = torch.randn(rows, r, generator=random) * 0.02
    tensors |= {PREFIX + name: tensor for name, tensor in (extra or {}).items()}
    save_file({k: t.to(dtype).contiguous() for k, t in tensors.items()}, folder / WEIGHTS)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base",
        "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": list(targets), "modules_to_save": None,
        "rank_pattern": ranks or {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
        "megatron_config": None, "megatron_core": "megatron.core", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def edit_adapter(folder: Path, **changes: torch.Tensor | None) -> None:
    """Put tensors in (keys with ``__`` for ``.``, without PEFT's prefix), or take them out (None)."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        key = PREFIX + name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    save_file(tensors, folder / WEIGHTS)
