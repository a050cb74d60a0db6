"""The base with a delta whose scales can be trained: codes and zero points stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from vllm_prinmix.compress.model import is_tied
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix

Quantized = QuantizedFactors | QuantizedMatrix


class Change(nn.Module):
    """W -> W + dW, where each scale of dW is multiplied by a trained factor (1 at first).

    Codes stay bytes and are dequantized anew in each forward pass. A matrix all of whose rows have one scale
    (BitDelta) keeps one.
    """

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.quantized = quantized
        scale = quantized.scale
        shared = isinstance(quantized, QuantizedMatrix) and bool((scale == scale[0]).all())
        self.factor = nn.Parameter(torch.ones_like(scale[:1] if shared else scale))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [rows, cols] -> the same; `dense` of the quantized form, but differentiable."""
        quantized = self.quantized
        scale = (quantized.scale * self.factor)[:, None]
        if isinstance(quantized, QuantizedMatrix):
            return torch.addcmul(weight, quantized.codes.float() - quantized.zero.float()[:, None], scale)
        change = quantized.u().T @ (quantized.v() * scale)
        return weight + (change if quantized.row_scale is None else change * quantized.row_scale[:, None])

    @torch.no_grad()
    def result(self) -> Quantized:
        """The quantized form with the trained scales."""
        return replace(self.quantized, scale=self.quantized.scale * self.factor)


class Student:
    """A model on ``device`` whose only trainable parameters are the factors of ``changes``' scales.

    ``model`` is on the meta device (`build_model`) and becomes the student. ``changes`` (quantized) and
    ``exact`` (the fine-tune's own tensors) go by weight names; all else is the base's.
    """

    def __init__(
        self,
        model: Any,
        base: Checkpoint,
        changes: Mapping[str, Quantized],
        exact: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self.model = model
        tied = is_tied(model)
        for name, _ in list(model.named_parameters()):
            weight = exact[name].float() if name in exact else base.load(name, torch.float32)
            module, _, field = name.rpartition(".")
            parameter = nn.Parameter(weight.to(device), requires_grad=False)
            setattr(model.get_submodule(module), field, parameter)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.to(device)
        # One layer's activations and dequantized weights at a time for the backward pass. transformers does
        # so only for models in training, where it would drop activations too.
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        self.changes = {name: Change(_on(quantized, device)) for name, quantized in changes.items()}
        for name, change in self.changes.items():
            targets = [name.removesuffix(".weight")]
            if tied and name == EMBEDDING:
                targets.append(HEAD.removesuffix(".weight"))
            for target in targets:
                # "unsafe" leaves out a trial run, which would dequantize each matrix once more.
                parametrize.register_parametrization(
                    model.get_submodule(target), "weight", change, unsafe=True
                )

    def factors(self) -> list[nn.Parameter]:
        return [change.factor for change in self.changes.values()]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [samples, tokens] -> float32 [samples, tokens, vocabulary]."""
        return self.model(input_ids=tokens, use_cache=False).logits.float()

    def results(self) -> dict[str, Quantized]:
        """The changes with their trained scales, on the CPU."""
        return {name: _on(change.result(), torch.device("cpu")) for name, change in self.changes.items()}


def _on(quantized: Quantized, device: torch.device) -> Quantized:
    moved = {name: v.to(device) for name, v in vars(quantized).items() if isinstance(v, torch.Tensor)}
    return replace(quantized, **moved)  # type: ignore[arg-type]
