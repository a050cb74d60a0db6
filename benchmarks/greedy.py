"""Whether served tokens are those of greedy decoding in transformers: the reference for serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Two tokens whose log-probs lie closer than this may change places by rounding alone.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One sequence against the reference: does every token equal the greedy one, up to near ties?"""

    equal: bool
    near_ties: int  # tokens that differ where the reference's two best log-probs are within NEAR_TIE
    logprobs: torch.Tensor  # float32 [prompt + tokens - 1, vocabulary]: row i is of token i + 1


def load_reference(checkpoint: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A checkpoint in transformers, for `compare`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


@torch.no_grad()
def compare(
    model: torch.nn.Module, sequences: Sequence[tuple[list[int], list[int]]], batch: int = 64
) -> list[Comparison]:
    """Compare (prompt ids, generated ids) pairs with greedy decoding by ``model``.

    One forward pass over prompt and answer decides it: the tokens are greedy ones exactly if each is the
    best one after those before it. Causal attention makes padding on the right harmless.
    """
    results: list[Comparison | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [torch.tensor(sequences[i][0] + sequences[i][1]) for i in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logprobs = model(padded).logits.float().log_softmax(-1)
        for row, i in enumerate(chosen):
            prompt, generated = sequences[i]
            own = logprobs[row, : len(prompt) + len(generated) - 1]
            best = own[len(prompt) - 1 :].topk(2)
            differs = best.indices[:, 0] != torch.tensor(generated)
            is_second = best.indices[:, 1] == torch.tensor(generated)
            ties = differs & is_second & (best.values[:, 0] - best.values[:, 1] < NEAR_TIE)
            results[i] = Comparison(bool((differs == ties).all()), int(ties.sum()), own.clone())
    return [r for r in results if r is not None]
