"""The architectures that can be compressed, and what their checkpoints have to hold.

A model is built from its config on the meta device: all modules, no memory. Layers get their weights
one at a time (`vllm_prinmix.compress.stream`).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import nn

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}


class Kind(Enum):
    """What a tensor of a checkpoint is, and so how its change is stored."""

    LINEAR = "linear"  # quantized factors
    EMBEDDING = "embedding"  # quantized factors, with --embedding-ratio
    HEAD = "lm_head"  # quantized factors, with --embedding-ratio
    EXACT = "exact"  # norm weights and biases: as they are


def read_architecture(checkpoint: Checkpoint) -> Any:
    """The checkpoint's transformers config. Raises PrinMixError for an architecture that is not supported."""
    from transformers import AutoConfig

    where = checkpoint.config_folder / "config.json"
    found = checkpoint.config.get("architectures") or [
        f"none, model_type {checkpoint.config.get('model_type')}"
    ]
    if found[0] not in ARCHITECTURES or checkpoint.config.get("model_type") != ARCHITECTURES[found[0]]:
        raise PrinMixError(
            "unsupported architecture", where=where, found=found[0], expected=", ".join(ARCHITECTURES)
        )
    if "quantization_config" in checkpoint.config:
        method = (checkpoint.config["quantization_config"] or {}).get("quant_method")
        raise PrinMixError(
            "the checkpoint is quantized",
            where=where,
            found=method,
            expected="bfloat16, float16 or float32 weights",
            fix="give the checkpoint that it was quantized from",
        )
    try:
        return AutoConfig.from_pretrained(checkpoint.config_folder)
    except Exception as error:  # validation of a damaged config raises many kinds
        raise PrinMixError("transformers cannot read the config", where=where, found=error) from error


def build_model(config: Any) -> Any:
    """The whole model in float32 on the meta device, but for its rotary tables: no checkpoint holds them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)
    return model


def expected_tensors(model: Any) -> dict[str, tuple[Kind, tuple[int, ...]]]:
    """Every tensor a checkpoint of this model holds: its kind and shape, in the model's own order.

    Tied embeddings appear once, as the embedding.
    """
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {}
    for name, parameter in model.named_parameters():
        if name == EMBEDDING:
            kind = Kind.EMBEDDING
        elif name == HEAD:
            kind = Kind.HEAD
        else:
            kind = Kind.LINEAR if name in linears else Kind.EXACT
        expected[name] = (kind, tuple(parameter.shape))
    return expected


def is_tied(model: Any) -> bool:
    """Whether the embedding serves as lm_head too."""
    return HEAD not in dict(model.named_parameters())


def is_transposed(model: Any, name: str) -> bool:
    """Whether a matrix is compressed as its transpose: an untied embedding, whose inputs are one-hot."""
    return name == EMBEDDING and not is_tied(model)


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."
