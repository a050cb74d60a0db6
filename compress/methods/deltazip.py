"""DeltaZip (Yao et al., 2024, arXiv 2312.05215): two of four weights of the delta, at 2 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import MatrixBaseline, as_matrix, check_width, report_error
from vllm_prinmix.compress.quantization.grid import Grid, round_to_grid, symmetric_grid
from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian, damped_cholesky
from vllm_prinmix.compress.quantization.threads import one_thread_if_small
from vllm_prinmix.kernels.quantized import QuantizedMatrix

KEPT, GROUP = 2, 4  # entries that may differ from zero, of so many neighbours in a row
BLOCK = 128  # columns that feed back into each other one by one; a multiple of GROUP


@dataclass(frozen=True)
class DeltaZip(MatrixBaseline):
    """SparseGPT (Frantar and Alistarh, 2023) with symmetric grids, one per row, which have a level at 0.

    Here zeros take as many bits as other codes. The report's "native_bytes" is what the method's own format
    would take: two codes of each four, their places of 2 bits each, and a float16 scale per row.
    """

    name: ClassVar[str] = "deltazip"
    summary: ClassVar[str] = "two of four weights, at 2 or 4 bits (--bits)"

    bits: tuple[int, ...] = (2,)

    def check(self) -> None:
        check_width(self.bits, (2, 4))

    @property
    def width(self) -> int:
        return self.bits[0]

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedMatrix, Report]:
        bits = torch.full((len(dw),), self.width, dtype=torch.uint8, device=dw.device)
        grid = symmetric_grid(dw, bits)
        quantized = as_matrix(sparse_gptq(dw, hessian, grid), grid)
        rows, cols = dw.shape
        native = native_bytes(self.width, rows, cols)
        return quantized, report_error(dw, quantized, hessian) | {"native_bytes": native}


def sparse_gptq(weight: torch.Tensor, hessian: Hessian, grid: Grid) -> torch.Tensor:
    """Codes of which at most KEPT of each GROUP neighbours are not the zero point: uint8 [rows, cols].

    ``weight`` float32 [rows, cols]; ``grid`` has an entry per row, its zero points are codes. As in `gptq`,
    with H + damping = F D F^T the error of a row is sum_k D_k (e_k + sum_{j>k} e_j F_jk)^2 and columns are
    visited from the last to the first, here in their own order. When a group is reached, what it would cost
    to set entry k to zero is D_k times the square of its `unrounded` value.
    """
    matrix = hessian.matrix.diag() if hessian.is_diagonal else hessian.matrix.clone()
    lower = damped_cholesky(matrix, DAMPING * matrix.diagonal().mean())
    cost = lower.diagonal().square()
    factor = lower / lower.diagonal()
    weight = weight.T.contiguous()
    scale, zero, top = grid.scale, grid.zero.float(), grid.top
    target, error, codes = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    size = len(weight)
    keep = torch.empty(0)
    with one_thread_if_small(size):
        for start in reversed(range(0, size, BLOCK)):
            stop = min(start + BLOCK, size)
            for k in reversed(range(start, stop)):
                first = k // GROUP * GROUP
                if k + 1 == min(first + GROUP, size):
                    group = slice(first, k + 1)
                    values = unrounded(weight[group], target[group], factor[group, group])
                    keep = two_of_four(values.square() * cost[group, None])
                codes[k] = torch.where(keep[k - first], round_to_grid(target[k], scale, zero, top), zero)
                error[k] = weight[k] - (codes[k] - zero) * scale
                target[start:k].addcmul_(factor[k, start:k, None], error[k, None])
            target[:start].addmm_(factor[start:stop, :start].T, error[start:stop])
    return codes.T.to(torch.uint8).contiguous()


def unrounded(weight: torch.Tensor, target: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What the entries of a group should be, were none of them rounded: float32 [g, n], as both arguments.

    ``target`` takes the entries of the group that follow for unchanged, though they are moved themselves.
    """
    values = target.clone()
    for k in reversed(range(len(values))):
        values[:k].addcmul_(factor[k, :k, None], (weight[k] - values[k])[None])
    return values


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """bool, the shape of ``scores`` [GROUP or fewer, n]: the KEPT largest of each column."""
    order = torch.argsort(scores, dim=0, descending=True, stable=True)[:KEPT]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order, True)


def native_bytes(bits: int, rows: int, cols: int) -> int:
    """Bytes of KEPT codes and places (2 bits each) of each GROUP, and a float16 scale per row."""
    return ceil(rows * ceil(cols / GROUP) * KEPT * (bits + 2) / 8) + 2 * rows
