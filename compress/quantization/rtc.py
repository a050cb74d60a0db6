"""Reconstruction target correction: U refitted to the quantized V (Eq. 7)."""

from __future__ import annotations

import torch

from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian, damped_cholesky

ROWS = 8192  # corrected at once; rows are independent of each other


def correct_target(
    dw: torch.Tensor, u: torch.Tensor, sv: torch.Tensor, hessian: Hessian, *, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """U~ that minimises ||dW X - U~ S V^ X||^2 (Eq. 7), and H_U = S V^ H V^^T S (Eq. 6).

    ``dw`` float32 [rows, cols]: the whole delta, the directions that were dropped included; ``u`` float32
    [rows, directions]: U before the correction; ``sv`` float32 [directions, cols]: S V^, the active rows
    only. Returns float32 [rows, directions] and float32 [directions, directions].

    The correction is solved for, not U~ itself: U~ = U + (dW - U S V^) H V^^T S (H_U + damping)^-1. Without
    damping that is Eq. 7. With it, U~ is drawn to U instead of to zero, so it is never worse than U on the
    calibration data, and it carries over better to other data. ``damping`` is a fraction of each diagonal
    entry, whatever its singular value.
    """
    projected = hessian.times(sv).T  # H V^^T S, [cols, directions]
    metric = sv @ projected
    metric = (metric + metric.T) / 2
    diagonal = metric.diagonal().clamp_(min=0)  # rounding can leave what is zero just below it
    # The floor leaves directions without weight on the calibration data (zero diagonal) as they are.
    floor = torch.finfo(torch.float32).eps * diagonal.max()
    lower = damped_cholesky(metric.clone(), damping * diagonal.clamp(min=floor))
    corrected = torch.empty_like(u)
    for dw_part, u_part, result in zip(dw.split(ROWS), u.split(ROWS), corrected.split(ROWS), strict=True):
        gradient = dw_part @ projected - u_part @ metric
        result.copy_(u_part + torch.cholesky_solve(gradient.T, lower).T)
    return corrected, metric
