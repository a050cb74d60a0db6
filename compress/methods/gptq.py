"""GPTQ (Frantar et al., 2022, arXiv 2210.17323) of the delta as it is, without SVD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import MatrixBaseline, as_matrix, check_width, report_error
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import Grid, clipped_grids, dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import matrix_bytes
from vllm_prinmix.kernels.quantized import MAX_BITS, QuantizedMatrix

WIDTHS = tuple(range(1, MAX_BITS + 1))


@dataclass(frozen=True)
class Gptq(MatrixBaseline):
    """One min-max grid per row. ``bits``: the one width, or empty for the widest that the ratio allows.

    With ``clipping`` each row has the best of several grids: the fewer bits, the more that is worth. A row's
    scale and zero point take 6 bytes, so one bit per weight is a little more than 1/16.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "the whole delta at one width, by GPTQ"

    bits: tuple[int, ...] = ()
    clipping: bool = False

    def check(self) -> None:
        if self.bits:
            check_width(self.bits, WIDTHS)

    @property
    def width(self) -> int:
        return self.bits[0] if self.bits else WIDTHS[0]

    @property
    def has_own_size(self) -> bool:
        return bool(self.bits)

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedMatrix, Report]:
        rows, cols = dw.shape
        width = self.width if self.has_own_size else self._widest(rows, cols, budget_bytes)
        bits = torch.full((rows,), width, dtype=torch.uint8, device=dw.device)
        grids = clipped_grids(dw, width) if self.clipping else [minmax_grid(dw, bits)]
        quantized = best_of(dw, hessian, grids)
        return quantized, report_error(dw, quantized, hessian)

    def _widest(self, rows: int, cols: int, budget_bytes: int | None) -> int:
        assert budget_bytes is not None
        fitting = [bits for bits in WIDTHS if matrix_bytes(bits, rows, cols) <= budget_bytes]
        if not fitting:
            raise PrinMixError(
                "not even one bit per weight fits",
                found=f"{budget_bytes} bytes for {rows} x {cols}",
                expected=f"{matrix_bytes(1, rows, cols)} bytes",
            )
        return fitting[-1]


def best_of(dw: torch.Tensor, hessian: Hessian, grids: list[Grid]) -> QuantizedMatrix:
    """Each row of ``dw`` (float32 [rows, cols]) by GPTQ on that of ``grids`` with the least error in H."""
    best = as_matrix(gptq(dw, hessian, grids[0]), grids[0])
    errors = hessian.norm(dw - best.dense())
    for grid in grids[1:]:
        codes = gptq(dw, hessian, grid)
        error = hessian.norm(dw - dequantize(codes, grid))
        better = error < errors
        errors = torch.where(better, error, errors)
        best.codes = torch.where(better[:, None], codes, best.codes)
        best.scale = torch.where(better, grid.scale, best.scale)
        best.zero = torch.where(better, grid.zero, best.zero)
    return best
