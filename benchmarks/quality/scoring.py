"""What compressed weights do to the model: exact match, KL divergence, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.demo.evaluate import exact_match
from benchmarks.quality.compressing import Run
from benchmarks.quality.material import Material, batches
from benchmarks.quality.metrics import kl_divergence
from benchmarks.quality.schemes import Reference
from vllm_prinmix.compress.model import Kind


class Scorer:
    """The fine-tuned model in float32, whose weights are overwritten by each run's, and its own predictions.

    The latter take tokens x vocabulary x 4 bytes of host memory.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        self.device = material.limits.device
        loader: Any = AutoModelForCausalLM  # transformers' types take `to` for another method
        self.model = loader.from_pretrained(material.finetuned.folder, dtype=torch.float32)
        self.model.to(self.device).eval()
        self.batches = batches(material.texts)
        self.reference = [torch.log_softmax(logits, dim=-1).cpu() for logits in self._logits()]

    def score(self, run: Run) -> dict[str, Any]:
        """The run's figures: "kl" (nats per token), "exact_match" (0 to 1, or None), "bytes", "errors"."""
        size, errors = self._put(run)
        return {
            "kl": self._kl(),
            "exact_match": self._exact_match(),
            "bytes": size,
            "errors": errors,
        }

    @torch.no_grad()
    def _put(self, run: Run) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
        """Overwrite the weights; returns bytes and each linear's errors.

        "linears", "linears_dense" (2 per weight), "all" and "all_dense" count payloads and exact tensors.
        """
        material = self.material
        size = {
            "linears": 0,
            "linears_dense": 2 * sum(p for name, p in self._numel() if material.kinds[name] is Kind.LINEAR),
            "all": 0,
            "all_dense": 2 * sum(p for _, p in self._numel()),
        }
        errors = {}
        reference = run.compressor if isinstance(run.compressor, Reference) else None
        whole = reference is None or reference.takes_exact  # what is never quantized is the fine-tune's
        for name, parameter in self.model.named_parameters():
            exact, changed = material.is_exact(name), name in material.changed
            taken = whole and (exact or reference is not None)
            weight = (material.finetuned if taken else material.base).load(name, torch.float32)
            if changed and exact and whole:
                size["all"] += material.finetuned.tensors[name].nbytes
            elif changed and not exact:
                change, figures = run.work.load(name)
                if reference is None:
                    weight += change
                used = figures.pop("bytes")
                size["all"] += used
                if material.kinds[name] is Kind.LINEAR:
                    size["linears"] += used
                    errors[name] = figures
            parameter.copy_(weight)
        return size, errors

    def _numel(self) -> Iterator[tuple[str, int]]:
        return ((name, parameter.numel()) for name, parameter in self.model.named_parameters())

    @torch.no_grad()
    def _logits(self) -> Iterator[torch.Tensor]:
        """Of each batch, those that count: float32 [n, vocabulary] on the device."""
        for batch in self.batches:
            logits = self.model(input_ids=batch.ids.to(self.device), use_cache=False).logits
            yield logits[:, :-1][batch.counts.to(self.device)]

    def _kl(self) -> float:
        total, tokens = 0.0, 0
        for reference, logits in zip(self.reference, self._logits(), strict=True):
            found = kl_divergence(reference.to(self.device), logits)
            total, tokens = total + found.sum().item(), tokens + len(found)
        return total / tokens

    def _exact_match(self) -> float | None:
        material = self.material
        if not material.questions or not material.limits.exact_match:
            return None
        return exact_match(self.model, material.questions, tokenizer=material.tokenizer)
