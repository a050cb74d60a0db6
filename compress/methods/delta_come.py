"""Delta-CoMe (Ping et al., 2024, arXiv 2406.08903): singular directions at 8, 3 and 2 bits, by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import Baseline, report_error
from vllm_prinmix.compress.methods.paper import direction_bytes
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.kernels.packing import ALIGNMENT, factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors

# As published for 4096 x 4096: directions at 8 and 3 bits, in a budget of so many directions of 2 bits.
EIGHT, THREE, WHOLE = 2, 32, 1024
WIDTHS = (8, 3, 2)


@dataclass(frozen=True)
class DeltaCome(Baseline):
    """2 directions at 8 bits, 32 at 3 and as many at 2 as the budget holds; see `ranks` for small budgets.

    V by GPTQ with the metric of the layer's inputs, then U of each width by GPTQ with the metric of what that
    width's V makes of them; no correction of U. Here a vector has one grid and all its bytes count. Published
    were groups of 128 entries, their scales not counted.

    ``delta_come_quirk``: calibrate as the published program does, which takes a layer's outputs for its
    inputs after each width: 8 bits are calibrated on what the layers before made of the samples, applied
    three times each, 3 bits on that after this layer too, 2 bits after this layer twice.
    """

    name: ClassVar[str] = "delta-come"
    summary: ClassVar[str] = "2 singular directions at 8 bits, 32 at 3, the rest at 2"

    delta_come_quirk: bool = False

    @property
    def repeats(self) -> int:
        return len(WIDTHS) if self.delta_come_quirk else 0

    def least_bytes(self, rows: int, cols: int) -> int:
        return factors_bytes([2], [2], rows, cols)

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedFactors, Report]:
        assert budget_bytes is not None
        u, sigma, v = thin_svd(dw)
        rows, cols = dw.shape
        counts = ranks(rows, cols, budget_bytes, len(sigma))
        blocks = [QuantizedFactors.empty(rows, cols, dw.device)]
        metrics = hessian.repeated if self.delta_come_quirk else (hessian,) * len(WIDTHS)
        start = 0
        for bits, count, metric in zip(WIDTHS, counts, metrics, strict=True):
            here = slice(start, start + count)
            if count:
                blocks.append(_block(u[:, here], sigma[here], v[here], bits, metric))
            start += count
        factors = _joined(blocks)
        return factors, report_error(dw, factors, hessian)


def ranks(rows: int, cols: int, budget_bytes: int, most: int) -> tuple[int, int, int]:
    """Directions at 8, 3 and 2 bits within ``budget_bytes``, ``most`` together.

    2 and 32 where the budget is as large as published; less in proportion where it is smaller, but one at
    8 bits where it fits.
    """
    cost = [direction_bytes(bits, rows, cols) for bits in WIDTHS]
    left = budget_bytes // ALIGNMENT * ALIGNMENT  # a payload padded to it fits where the unpadded one does
    share = min(1.0, left / (cost[2] * WHOLE))
    wanted = (max(1, round(EIGHT * share)), round(THREE * share), most)
    counts: list[int] = []
    for price, number in zip(cost, wanted, strict=True):
        counts.append(min(number, left // price, most - sum(counts)))
        left -= counts[-1] * price
    return counts[0], counts[1], counts[2]


def _block(
    u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor, bits: int, hessian: Hessian
) -> QuantizedFactors:
    """Directions of one width: U [rows, n], S [n], V [n, cols]."""
    width = torch.full_like(sigma, bits, dtype=torch.uint8)
    v_grid = minmax_grid(v, width)
    v_codes = gptq(v, hessian, v_grid)
    sv = sigma[:, None] * dequantize(v_codes, v_grid)
    metric = hessian.times(sv) @ sv.T
    metric = (metric + metric.T) / 2
    metric.diagonal().clamp_(min=0)  # rounding can leave what is zero just below it
    u_grid = minmax_grid(u.T, width)
    return QuantizedFactors(
        v_codes=v_codes,
        u_codes=gptq(u, Hessian(metric), u_grid, per_column=True).T.contiguous(),
        v_bits=width,
        u_bits=width.clone(),
        scale=v_grid.scale * sigma * u_grid.scale,
        v_zero=v_grid.zero,
        u_zero=u_grid.zero,
    )


def _joined(blocks: list[QuantizedFactors]) -> QuantizedFactors:
    """The directions of all blocks, one after the other."""
    names = ("v_codes", "u_codes", "v_bits", "u_bits", "scale", "v_zero", "u_zero")
    return QuantizedFactors(**{name: torch.cat([getattr(b, name) for b in blocks]) for name in names})
