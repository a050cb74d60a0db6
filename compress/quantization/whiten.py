"""Singular value decomposition in the metric of the inputs: the directions that outputs are made of."""

from __future__ import annotations

import torch

from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian
from vllm_prinmix.compress.quantization.svd import thin_svd


def whitened_svd(
    dw: torch.Tensor, hessian: Hessian, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dW = U diag(S) V: float32 [rows, cols] -> U [rows, r], S [r] descending, V [r, cols].

    r is at most ``most`` (None: all), the largest in S.

    With H + damping = L L^T, U S (V L) is the singular value decomposition of dW L, so that cutting it off
    after any direction is best for outputs, not for weights. U is orthonormal, V is so in that metric. Eq. 5
    needs U's alone: ||(dW - U S V^) X||^2 = sum_i S_i^2 dv_i H dv_i^T still holds exactly. The damping is
    GPTQ's: less fits calibration better, more carries over to other data.
    """
    if hessian.is_diagonal:
        root = (hessian.matrix + DAMPING * hessian.matrix.mean()).sqrt()
        u, sigma, white = thin_svd(dw * root, most)
        return u, sigma, white / root
    order, factor, pivots = hessian.feedback
    roots = pivots.sqrt()
    u, sigma, white = thin_svd(dw[:, order] @ factor * roots, most)
    v = torch.empty_like(white)
    v[:, order] = torch.linalg.solve_triangular(
        factor, white / roots, upper=False, left=False, unitriangular=True
    )
    return u, sigma, v
