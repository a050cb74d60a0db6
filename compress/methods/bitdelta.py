"""BitDelta (Liu et al., 2024, arXiv 2402.10193): the signs of the delta, and one scale per matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_prinmix.compress.methods.base import Report
from vllm_prinmix.compress.methods.baseline import MatrixBaseline, report_error
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.quantized import QuantizedMatrix

SCALES = ("mean", "fitted")


@dataclass(frozen=True)
class BitDelta(MatrixBaseline):
    """dW ~= a sign(dW), sign(0) = +1.

    ``scale``: "mean" is the published start, a = mean |dW|, the best for the weights; "fitted" is the best
    for the outputs on calibration data. The published training of the scales is `--distill`, for all methods.
    """

    name: ClassVar[str] = "bitdelta"
    summary: ClassVar[str] = "signs and one scale per matrix"

    scale: str = "mean"

    def check(self) -> None:
        if self.scale not in SCALES:
            raise PrinMixError(
                "unknown scale", where="--scale", found=self.scale, expected=" or ".join(SCALES)
            )

    @property
    def width(self) -> int:
        return 1

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedMatrix, Report]:
        codes = (dw >= 0).to(torch.uint8)
        scale = dw.abs().mean() if self.scale == "mean" else fitted_scale(dw, hessian)
        rows = dw.shape[0]
        quantized = QuantizedMatrix(
            codes=codes,
            bits=1,
            scale=(2 * scale).repeat(rows),
            zero=torch.full((rows,), 0.5, dtype=torch.float16, device=dw.device),
        )
        return quantized, report_error(dw, quantized, hessian)


def fitted_scale(dw: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """The a that minimises ||(dW - a B) X||^2, B = sign(dW): <dW, B>_H / <B, B>_H; float32 scalar."""
    signs = torch.where(dw >= 0, 1.0, -1.0)
    weighted = hessian.times(signs)
    over = (weighted * dw).sum(dtype=torch.float64)
    return (over / (weighted * signs).sum(dtype=torch.float64)).float()
