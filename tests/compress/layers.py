"""Synthetic layers like an LLM's: power-law singular values, and inputs whose energy is in few directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Layer:
    dw: torch.Tensor  # float32 [rows, cols]
    calibration: torch.Tensor  # H of the calibration tokens, float32 [cols, cols]
    heldout: torch.Tensor  # H of as many other tokens


def make_layer(
    rows: int, cols: int, *, decay: float = 0.6, tokens: int = 2048, outliers: int = 0, seed: int = 0
) -> Layer:
    """Singular values (1 + i/4)^-decay, input variances (1 + k)^-1.2, generic bases, loud input channels."""
    random = torch.Generator().manual_seed(seed)

    def basis(size: int, vectors: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, vectors, generator=random)).Q

    rank = min(rows, cols)
    sigma = (1 + torch.arange(rank) / 4) ** -decay
    dw = (basis(rows, rank) * sigma) @ basis(cols, rank).T
    root = basis(cols, cols) * (1 + torch.arange(cols)) ** -0.6
    loud = torch.randperm(cols, generator=random)[:outliers]

    def metric() -> torch.Tensor:
        inputs = torch.randn(tokens, cols, generator=random) @ root.T
        inputs[:, loud] *= 10
        return inputs.T @ inputs

    return Layer(dw, metric(), metric())


def relative_error(dw: torch.Tensor, approximation: torch.Tensor, metric: torch.Tensor) -> float:
    """||dW X - dW^ X||^2 / ||dW X||^2 in float64, H = X X^T."""
    dw, metric = dw.double(), metric.double()
    wrong = dw - approximation.double()
    return float(((wrong @ metric) * wrong).sum() / ((dw @ metric) * dw).sum())
