"""LoRA in plain torch, and its adapter on disk as PEFT writes it.

W + (alpha / rank) B A with A [rank, inputs] and B [outputs, rank] (E. J. Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", 2021). On disk: ``adapter_config.json`` and
``adapter_model.safetensors``, whose tensors are called ``base_model.model.<module>.lora_A.weight`` and
``...lora_B.weight``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class LoraLinear(torch.nn.Module):
    """A frozen linear layer plus the trainable product of two small ones, which is zero at first."""

    def __init__(self, frozen: torch.nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, alpha / rank
        self.lora_A = torch.nn.Linear(frozen.in_features, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, frozen.out_features, bias=False)
        torch.nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [..., inputs] -> float [..., outputs]."""
        return self.frozen(x) + self.scale * self.lora_B(self.lora_A(x))


def attach(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
    """Freeze ``model`` and give each of its linear layers, ``lm_head`` left out, an adapter, in place."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, LoraLinear(module, rank, alpha))


def save_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the adapters of a model that `attach` changed, in float32; ``base`` names its checkpoint."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    first = next(iter(found.values()))
    rank = first.lora_A.out_features
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.{half}.weight": getattr(module, half).weight.detach().float().contiguous()
        for name, module in found.items()
        for half in ("lora_A", "lora_B")
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapter in ``folder`` to the weights of the plain ``model``, in place."""
    config = json.loads((folder / CONFIG).read_text())
    scale, tensors = config["lora_alpha"] / config["r"], load_file(folder / WEIGHTS)
    for name in [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]:
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        model.get_parameter(f"{name.removeprefix(PREFIX)}.weight").add_(product, alpha=scale)
