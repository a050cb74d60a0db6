"""Vectors quantized on the best of several grids, and what each width would cost them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_prinmix.compress.quantization.gptq import gptq_with_errors
from vllm_prinmix.compress.quantization.grid import CLIPPED_GRIDS, Grid, clipped_grids, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian

STACKED_ENTRIES = 1 << 26  # weights quantized in one call; bounds the memory (1 GB), not the result
# Vectors of a large matrix that `simulate` quantizes to every width; the others' errors are read off between
# their neighbours. Of twice as many all are quantized.
SAMPLED = 128


def quantize_best(
    vectors: torch.Tensor, hessian: Hessian, bits: torch.Tensor, *, clipping: bool = True
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """Each row of ``vectors`` (float32 [n, K]) by GPTQ to its ``bits`` (uint8 [n]), on its best grid.

    All grids of a row are tried in one stacked call. Returns codes uint8 [n, K], the grids, and the errors
    d H d^T in GPTQ's damped metric, float64 [n].
    """
    codes = torch.empty_like(vectors, dtype=torch.uint8)
    scale = torch.empty(len(vectors), device=vectors.device)
    zero = torch.empty(len(vectors), dtype=torch.float16, device=vectors.device)
    errors = torch.empty(len(vectors), dtype=torch.float64, device=vectors.device)
    step = max(1, STACKED_ENTRIES // ((CLIPPED_GRIDS if clipping else 1) * max(1, vectors.shape[1])))
    for first in range(0, len(vectors), step):
        rows = slice(first, first + step)
        part = vectors[rows]
        grids = _grids(part, bits[rows], clipping)
        stacked = Grid(
            *(torch.cat([getattr(grid, name) for grid in grids]) for name in ("scale", "zero", "bits"))
        )
        found, missed = gptq_with_errors(part.repeat(len(grids), 1), hessian, stacked)
        missed, best = missed.view(len(grids), len(part)).min(dim=0)
        index = best * len(part) + torch.arange(len(part), device=part.device)
        codes[rows], errors[rows] = found[index], missed
        scale[rows], zero[rows] = stacked.scale[index], stacked.zero[index]
    return codes, Grid(scale, zero, bits), errors


def _grids(vectors: torch.Tensor, bits: torch.Tensor, clipping: bool) -> list[Grid]:
    return clipped_grids(vectors, bits) if clipping else [minmax_grid(vectors, bits)]


def simulate(
    vectors: torch.Tensor,
    hessian: Hessian,
    widths: Sequence[int],
    *,
    clipping: bool = True,
    sampled: int = SAMPLED,
) -> torch.Tensor:
    """What `quantize_best` to each of ``widths`` costs each row, in shares: float64 [n, len(widths)].

    A share is d H d^T / v H v^T in the damped metric. ``sampled`` rows, evenly spread over the n
    (0: all), are quantized in one stacked call. Between them the shares are interpolated: neighbours in the
    order of singular values differ little, and what the choice of widths needs is their trend.
    """
    n, count = len(vectors), len(widths)
    if not n:
        return torch.empty(0, count, dtype=torch.float64, device=vectors.device)
    known = torch.arange(n, device=vectors.device)
    if 0 < 2 * sampled < n:
        known = torch.linspace(0, n - 1, sampled, device=vectors.device).round().long().unique()
    chosen = vectors[known]
    bits = torch.tensor(widths, dtype=torch.uint8, device=vectors.device).repeat_interleave(len(known))
    _, _, errors = quantize_best(chosen.repeat(count, 1), hessian, bits, clipping=clipping)
    size = hessian.damped_norm(chosen).clamp(min=torch.finfo(torch.float64).tiny)
    shares = (errors.view(count, len(known)) / size).T
    if len(known) == n:
        return shares
    return _between(shares, known, n)


def _between(shares: torch.Tensor, known: torch.Tensor, n: int) -> torch.Tensor:
    """``shares`` [k, B] of the rows ``known`` -> [n, B]: logarithms smoothed, linear in between."""
    logs = shares.clamp(min=torch.finfo(torch.float64).tiny).log()
    # The mean of three: single vectors differ by chance more than their neighbourhoods do.
    padded = torch.cat([logs[:1], logs, logs[-1:]])
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    rows = torch.arange(n, device=known.device)
    right = torch.searchsorted(known, rows).clamp(1, len(known) - 1)
    left = right - 1
    weight = ((rows - known[left]).double() / (known[right] - known[left]))[:, None]
    return (smooth[left] * (1 - weight) + smooth[right] * weight).exp()
