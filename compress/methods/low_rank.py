"""Low rank (Ryu et al., 2023): the leading singular directions of the delta, all alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import Baseline, report_error
from vllm_prinmix.compress.methods.paper import direction_bytes
from vllm_prinmix.compress.quantization.grid import minmax_grid, quantize
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.kernels.packing import ALIGNMENT, factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors

BITS = 8  # the most that a delta can hold


@dataclass(frozen=True)
class LowRank(Baseline):
    """Truncated SVD, entries of U and V at 8 bits, rounded to nearest on min-max grids.

    Published with float16 factors (`low_rank_fp16`): 8 bits hold about twice the directions in the same
    bytes and lose next to nothing by rounding, so this is the stronger baseline.
    """

    name: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "truncated SVD, factors at 8 bits"

    def least_bytes(self, rows: int, cols: int) -> int:
        return factors_bytes([BITS], [BITS], rows, cols)

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedFactors, Report]:
        assert budget_bytes is not None
        rank = budget_bytes // ALIGNMENT * ALIGNMENT // direction_bytes(BITS, *dw.shape)
        u, sigma, v = thin_svd(dw)
        u, sigma, v = u[:, :rank].T.contiguous(), sigma[:rank], v[:rank]
        bits = torch.full_like(sigma, BITS, dtype=torch.uint8)
        u_grid, v_grid = minmax_grid(u, bits), minmax_grid(v, bits)
        factors = QuantizedFactors(
            v_codes=quantize(v, v_grid),
            u_codes=quantize(u, u_grid),
            v_bits=bits,
            u_bits=bits.clone(),
            scale=v_grid.scale * sigma * u_grid.scale,
            v_zero=v_grid.zero,
            u_zero=u_grid.zero,
        )
        return factors, report_error(dw, factors, hessian)


def low_rank_fp16(dw: torch.Tensor, budget_bytes: int) -> torch.Tensor:
    """float32 [rows, cols]: ``dw`` by as many directions as ``budget_bytes`` hold as float16 factors.

    The singular values are in U's factor. The delta format has no float16 factors: this is for comparisons.
    """
    u, sigma, v = thin_svd(dw)
    rank = budget_bytes // (2 * sum(dw.shape))
    left, right = (u[:, :rank] * sigma[:rank]).half(), v[:rank].half()
    return left.float() @ right.float()
