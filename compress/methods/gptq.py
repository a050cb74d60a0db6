"""GPTQ (Frantar et al., 2022, arXiv 2210.17323) of the delta as it is, without SVD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import MatrixBaseline, as_matrix, check_width, report_error
from vllm_prinmix.compress.quantization.best_grid import quantize_best
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import matrix_bytes
from vllm_prinmix.kernels.quantized import MAX_BITS, QuantizedMatrix

WIDTHS = tuple(range(1, MAX_BITS + 1))


@dataclass(frozen=True)
class Gptq(MatrixBaseline):
    """``bits``: the one width, or empty for the widest that the ratio allows.

    With ``clipping`` each row has the best of several grids, else its min-max grid: the fewer bits, the more
    that is worth. A row's scale and zero point take 6 bytes, so one bit per weight is just above 1/16.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "the whole delta at one width, by GPTQ"
    steps: ClassVar[tuple[str, ...]] = ("clipping",)

    bits: tuple[int, ...] = ()
    clipping: bool = True

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
        codes, grid, _ = quantize_best(dw, hessian, bits, clipping=self.clipping)
        quantized = as_matrix(codes, grid)
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
