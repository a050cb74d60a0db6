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
    """
    cross, metric = normal_equations(dw, sv, hessian)
    return corrected(u, cross, metric, damping), metric


def normal_equations(
    dw: torch.Tensor, sv: torch.Tensor, hessian: Hessian
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW H V^^T S, float32 [rows, directions], and H_U (Eq. 6): U~ of Eq. 7 solves U~ H_U = dW H V^^T S."""
    projected = hessian.times(sv).T
    metric = sv @ projected
    metric = (metric + metric.T) / 2
    metric.diagonal().clamp_(min=0)  # rounding can leave what is zero just below it
    return dw @ projected, metric


def corrected(
    u: torch.Tensor, cross: torch.Tensor, metric: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """U~ = U + (cross - U H_U) (H_U + damping)^-1, with ``cross`` and ``metric`` of `normal_equations`.

    The correction is solved for, not U~ itself. Without damping that is Eq. 7. With it, U~ is drawn to U
    instead of to zero, so it is never worse than U on the calibration data, and it carries over better to
    other data. ``damping`` is a fraction of each diagonal entry, whatever its singular value.
    """
    diagonal = metric.diagonal()
    # The floor leaves directions without weight on the calibration data (zero diagonal) as they are.
    floor = torch.finfo(torch.float32).eps * diagonal.max()
    lower = damped_cholesky(metric.clone(), damping * diagonal.clamp(min=floor))
    result = torch.empty_like(u)
    for u_part, cross_part, out in zip(u.split(ROWS), cross.split(ROWS), result.split(ROWS), strict=True):
        gradient = cross_part - u_part @ metric
        out.copy_(u_part + torch.cholesky_solve(gradient.T, lower).T)
    return result
