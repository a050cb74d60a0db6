"""GPT-Zip (Isik et al., 2023): GPTQ of the delta at 2 bits, then all but the largest 5 % set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import MatrixBaseline, as_matrix, report_error
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, symmetric_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.kernels.quantized import QuantizedMatrix

BITS = 2
SPARSITY = 0.95


@dataclass(frozen=True)
class GptZip(MatrixBaseline):
    """Symmetric grids, one per row, which have a level at exactly 0.

    Here zeros take as many bits as other codes. The report's "native_bytes" is what a sparse format could
    do with: the codes that are not zero, their places at the entropy of the density, a float16 scale per row.
    """

    name: ClassVar[str] = "gpt-zip"
    summary: ClassVar[str] = "2 bits by GPTQ, then 95 % zeros"

    @property
    def width(self) -> int:
        return BITS

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedMatrix, Report]:
        bits = torch.full((len(dw),), BITS, dtype=torch.uint8, device=dw.device)
        grid = symmetric_grid(dw, bits)
        codes = gptq(dw, hessian, grid)
        rows, cols = dw.shape
        keep = largest(dequantize(codes, grid), dw, round((1 - SPARSITY) * rows * cols))
        quantized = as_matrix(torch.where(keep, codes, grid.zero.to(torch.uint8)[:, None]), grid)
        native = native_bytes(rows, cols, int((quantized.codes != grid.zero[:, None]).sum()))
        return quantized, report_error(dw, quantized, hessian) | {"native_bytes": native}


def largest(values: torch.Tensor, ties: torch.Tensor, count: int) -> torch.Tensor:
    """bool [rows, cols]: the ``count`` entries of ``values`` that are largest, equal ones by ``ties``'s."""
    order = torch.argsort(ties.flatten().abs(), descending=True, stable=True)
    order = order[torch.argsort(values.flatten()[order].abs(), descending=True, stable=True)]
    keep = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    keep[order[:count]] = True
    return keep.view_as(values)


def native_bytes(rows: int, cols: int, used: int) -> int:
    """Bytes of ``used`` entries of BITS bits, their places, and a float16 scale per row."""
    density = used / (rows * cols)
    places = sum(-p * log2(p) for p in (density, 1 - density) if p) * rows * cols
    return ceil((used * BITS + places) / 8) + 2 * rows
