"""Figures of quality from plain tensors: errors of a layer's outputs, KL divergence, mean and deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

OUTLIERS = 0.01  # share of activations, the largest by absolute value (the paper's Table 7)
THIRDS = ("low", "mid", "high")
ROWS = 8192  # of a matrix at once, so that a head's outputs need not be whole in memory


@dataclass(frozen=True)
class OutputErrors:
    """Of one matrix's outputs; squares, means over elements [tokens, rows]."""

    all: float  # ||dW X - dW^ X||^2 / elements (Eq. 1)
    out: float  # the same over the outliers
    relative: float  # ||dW X - dW^ X||^2 / ||dW X||^2
    relative_out: float  # the same over the outliers

    def asdict(self) -> dict[str, float]:
        return asdict(self)


def outliers(outputs: torch.Tensor, share: float = OUTLIERS) -> torch.Tensor:
    """bool, as ``outputs``: the ``share`` of its elements with the largest absolute values, at least one."""
    count = max(1, int(outputs.numel() * share))
    largest = outputs.abs().flatten().topk(count, sorted=False).indices
    mask = torch.zeros(outputs.numel(), dtype=torch.bool, device=outputs.device)
    mask[largest] = True
    return mask.view_as(outputs)


def output_errors(
    change: torch.Tensor, decoded: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor
) -> OutputErrors:
    """Errors of ``decoded`` for ``change``, float32 [rows, cols], on ``inputs`` float32 [tokens, cols].

    ``mask`` bool [tokens, rows] marks the outliers among the outputs.
    """
    over = under = over_out = under_out = 0.0
    for start in range(0, len(change), ROWS):
        rows = slice(start, start + ROWS)
        marked = mask[:, rows]
        wrong = (inputs @ (change[rows] - decoded[rows]).T).square_()
        over += wrong.sum(dtype=torch.float64).item()
        over_out += wrong[marked].sum(dtype=torch.float64).item()
        right = (inputs @ change[rows].T).square_()
        under += right.sum(dtype=torch.float64).item()
        under_out += right[marked].sum(dtype=torch.float64).item()
    return OutputErrors(
        all=over / mask.numel(),
        out=over_out / int(mask.sum()),
        relative=_quotient(over, under),
        relative_out=_quotient(over_out, under_out),
    )


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of each token in nats: log-probabilities and logits [n, vocabulary] -> [n]."""
    found = torch.log_softmax(logits.float(), dim=-1)
    return (reference.exp() * (reference - found)).sum(dim=-1, dtype=torch.float64)


def third(index: int, layers: int) -> str:
    """low, mid or high: which third of the layers ``index`` lies in. Of 28 they have 9, 9 and 10."""
    ends = [layers // 3, 2 * layers // 3]
    return THIRDS[sum(index >= end for end in ends)]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for that of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _quotient(over: float, under: float) -> float:
    """0 / 0 is 0."""
    return over / under if under else (math.inf if over else 0.0)
