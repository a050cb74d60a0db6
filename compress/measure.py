"""Errors of a compressed matrix."""

from __future__ import annotations

import math

import torch

from vllm_prinmix.compress.quantization.hessian import Hessian

ROWS = 8192  # at once, so that the error of an lm_head needs no further matrices of its size


def activation_energy(dw: torch.Tensor, hessian: Hessian) -> float:
    """||dW X||_F^2 with H = X X^T, of float32 [rows, cols]."""
    return sum(float(hessian.norm(part).sum()) for part in dw.split(ROWS))


def activation_error(
    dw: torch.Tensor,
    decoded: torch.Tensor,
    hessian: Hessian,
    energy: float | None = None,
    transposed: bool = False,
) -> float:
    """||dW X - dW^ X||_F^2 / ||dW X||_F^2 of two float32 [rows, cols] (Eq. 1); 0 / 0 is 0.

    ``energy`` is the `activation_energy` of dW where it is known: half of the work. ``transposed``: the
    metric is that of dW^T's inputs (`model.is_transposed`).
    """
    if transposed:
        dw, decoded = dw.T, decoded.T
    over = sum(
        hessian.norm(a - b).sum().item() for a, b in zip(dw.split(ROWS), decoded.split(ROWS), strict=True)
    )
    return _quotient(over, activation_energy(dw, hessian) if energy is None else energy)


def factors_error(
    dw: torch.Tensor, u: torch.Tensor, sv: torch.Tensor, hessian: Hessian, energy: float | None = None
) -> float:
    """`activation_error` of dW^ = u sv, float32 [rows, n] and [n, cols], which is never whole in memory."""
    over = sum(
        hessian.norm(a - b @ sv).sum().item() for a, b in zip(dw.split(ROWS), u.split(ROWS), strict=True)
    )
    return _quotient(over, activation_energy(dw, hessian) if energy is None else energy)


def weight_error(dw: torch.Tensor, decoded: torch.Tensor) -> float:
    """||dW - dW^||_F^2 / ||dW||_F^2 of two float32 [rows, cols]: the error whatever the inputs are."""
    over = sum(_square(a - b) for a, b in zip(dw.split(ROWS), decoded.split(ROWS), strict=True))
    return _quotient(over, sum(map(_square, dw.split(ROWS))))


def relative_size(change: torch.Tensor, weight: torch.Tensor) -> float:
    """||change||_F / ||weight||_F of two float32 tensors of one shape."""
    return math.sqrt(_quotient(*(sum(map(_square, t.split(ROWS))) for t in (change, weight))))


def _square(part: torch.Tensor) -> float:
    return torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2


def _quotient(over: float, under: float) -> float:
    """0 / 0 is 0."""
    return over / under if under else (0.0 if not over else math.inf)
