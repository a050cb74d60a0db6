"""Singular value decomposition in the metric of the inputs: the directions that outputs are made of."""

from __future__ import annotations

import torch

from vllm_prinmix.compress.quantization.hessian import Hessian, damped_cholesky
from vllm_prinmix.compress.quantization.svd import thin_svd

# Of the metric that directions are found in, as a fraction of H's mean diagonal: less fits calibration
# better, more carries over to other data.
WHITENING = 0.01


def whitened_svd(
    dw: torch.Tensor, hessian: Hessian, damping: float = WHITENING
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dW = U diag(S) V: float32 [rows, cols] -> U [rows, r], S [r] descending, V [r, cols].

    With H + damping = L L^T, U S (V L) is the singular value decomposition of dW L, so that cutting it off
    after any direction is best for outputs, not for weights. U is orthonormal, V is so in that metric. Eq. 5
    needs U's alone: ||(dW - U S V^) X||^2 = sum_i S_i^2 dv_i H dv_i^T still holds exactly.
    """
    if hessian.is_diagonal:
        root = (hessian.matrix + damping * hessian.matrix.mean()).sqrt()
        u, sigma, white = thin_svd(dw * root)
        return u, sigma, white / root
    matrix = hessian.matrix.clone()
    lower = damped_cholesky(matrix, damping * hessian.matrix.diagonal().mean())
    u, sigma, white = thin_svd(dw @ lower)
    v = torch.linalg.solve_triangular(lower, white, upper=False, left=False)
    return u, sigma, v
