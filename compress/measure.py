"""Errors of a compressed matrix."""

from __future__ import annotations

import math

import torch

from vllm_prinmix.compress.hessian import Hessian


def activation_error(dw: torch.Tensor, decoded: torch.Tensor, hessian: Hessian) -> float:
    """||dW X - dW^ X||_F^2 / ||dW X||_F^2 with H = X X^T, of two float32 [rows, cols] (Eq. 1); 0 / 0 is 0."""
    over, under = hessian.norm(dw - decoded).sum().item(), hessian.norm(dw).sum().item()
    return over / under if under else (0.0 if not over else math.inf)


def weight_error(dw: torch.Tensor, decoded: torch.Tensor) -> float:
    """||dW - dW^||_F^2 / ||dW||_F^2 of two float32 [rows, cols]: the error whatever the inputs are."""
    return quotient(dw - decoded, dw) ** 2


def quotient(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a||_F / ||b||_F, summed in float64; 0 / 0 is 0."""
    over = torch.linalg.vector_norm(a, dtype=torch.float64).item()
    under = torch.linalg.vector_norm(b, dtype=torch.float64).item()
    return over / under if under else (0.0 if not over else math.inf)
