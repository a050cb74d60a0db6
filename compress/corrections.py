"""How a matrix is corrected for inputs that are not those of the fine-tuned model."""

from __future__ import annotations

import warnings

import torch

from vllm_prinmix.compress import stream
from vllm_prinmix.compress.quantization.hessian import Hessian

CHUNK = 8192  # rows that are corrected at once
ROWS = 256  # of a matrix, whose corrections tell how much to trust them all


class Sums:
    """H = sum y y^T over some samples, float32 [cols, cols], and what C (H + damping) is made of.

    That is M = W D of each matrix W [rows, cols] that reads y, D = sum (x - y) y^T. Of a ``writer``, a W that
    adds to the residual stream and is alone in reading y, M = sum (W (x - y) + r) y^T itself is summed up,
    float32 [rows, cols]: down_proj has few rows and many columns. Of all others D, float32 [cols, cols],
    which they may share.
    """

    def __init__(self, y: torch.Tensor, writer: torch.Tensor | None = None) -> None:
        cols = y.shape[1]
        self.moments = torch.zeros(cols, cols, device=y.device)
        self.writer = writer
        self.cross = torch.zeros(cols if writer is None else len(writer), cols, device=y.device)

    def add(self, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor | None = None) -> None:
        """Tokens' inputs in the fine-tuned model and in the compressed one; of a writer what is missing of
        the residual stream that it adds to, [tokens, rows]."""
        stream.add_lower(self.moments, y)
        missing = x - y
        if self.writer is not None:
            assert r is not None, "a writer makes up for the residual stream too"
            missing = torch.addmm(r, missing, self.writer.T)
        self.cross.addmm_(missing.T, y)

    def target(self, weight: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Those ``rows`` of M of W [rows, cols]."""
        if self.writer is None:
            return weight[rows] @ self.cross
        assert weight is self.writer
        return self.cross[rows]

    def __iadd__(self, other: Sums) -> Sums:
        self.moments += other.moments
        self.cross += other.cross
        return self


def finish(
    halves: list[Sums], weights: list[torch.Tensor]
) -> tuple[Hessian, list[torch.Tensor | None], list[str]]:
    """The metric of all samples, C of each matrix that reads them, and what was warned of.

    ``halves`` are of two halves of the samples, and are used up. C is a regression, and from few tokens it
    follows their accidents. What the C of either half explains of the other half tells how much of it can be
    trusted: it is multiplied by

        strength = sum <M', C> / sum <C H', C>,

    M of `Sums`, cut to 0 to 1, with the primed from the half that C is not from. None: nothing is to be
    corrected.
    """
    whole, other = halves
    for half in (whole.moments, other.moments):
        stream.mirror(half)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the metric of all samples says the same, or knows better
        strengths = _strengths(halves, weights)
    halves.clear()
    whole += other
    del other, half  # large, and not needed for the rest
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hessian = Hessian(whole.moments)
        corrections = [
            _correction(whole, weight, hessian, strength) if strength else None
            for weight, strength in zip(weights, strengths, strict=True)
        ]
    return hessian, corrections, [str(warning.message) for warning in caught]


def _correction(sums: Sums, weight: torch.Tensor, hessian: Hessian, strength: float) -> torch.Tensor:
    found = torch.empty_like(weight)
    for start in range(0, len(weight), CHUNK):  # an lm_head's is as large as it, and solving takes copies
        rows = slice(start, start + CHUNK)
        found[rows] = hessian.solve(sums.target(weight, rows)).mul_(strength)
    return found


def _strengths(halves: list[Sums], weights: list[torch.Tensor]) -> list[float]:
    """One number for each matrix, 0 to 1, from at most ROWS rows of it."""
    explained, size = [0.0] * len(weights), [0.0] * len(weights)
    for one, other in (halves, halves[::-1]):
        if not one.moments.any() or not other.moments.any():
            return [0.0] * len(weights)
        hessian, metric = Hessian(one.moments), Hessian(other.moments)
        for i, weight in enumerate(weights):
            rows = torch.linspace(0, len(weight) - 1, min(len(weight), ROWS), device=weight.device).long()
            found = hessian.solve(one.target(weight, rows))
            explained[i] += float((other.target(weight, rows) * found).sum(dtype=torch.float64))
            size[i] += float(metric.norm(found).sum())
        del hessian, metric
    return [min(max(e / s, 0.0), 1.0) if s else 0.0 for e, s in zip(explained, size, strict=True)]
