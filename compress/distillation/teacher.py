"""The fine-tune's predictions on calibration samples, kept as hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from vllm_prinmix.compress import stream
from vllm_prinmix.compress.model import is_tied
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint


class Teacher:
    """Runs the samples through the fine-tune once, one layer in memory at a time.

    What stays is each sample's last hidden states, float32 [tokens, hidden] on the CPU, and the head on
    ``device``: far less than logits.
    """

    def __init__(
        self,
        model: Any,
        finetuned: Checkpoint,
        samples: list[torch.Tensor],
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        hidden = stream.embed(finetuned, samples)
        for index in range(model.config.num_hidden_layers):
            tell(f"layer {index}: running the calibration samples")
            stream.run_layer(model, finetuned, index, hidden, set(), device)
        self.hidden = [states[0].cpu() for states in stream.final_norm(model, finetuned, hidden, device)]
        self.head = finetuned.load(EMBEDDING if is_tied(model) else HEAD, torch.float32).to(device)

    def logits(self, sample: int) -> torch.Tensor:
        """float32 [tokens, vocabulary] on the head's device."""
        return functional.linear(self.hidden[sample].to(self.head.device), self.head)
