"""Asymmetric min-max grids: one scale and one zero point for each vector of codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """w ~= scale * (code - zero), code in 0 ... 2**bits - 1; one entry of each tensor per vector."""

    scale: torch.Tensor  # float32 [vectors], above 0
    zero: torch.Tensor  # float16 [vectors], may be fractional
    bits: torch.Tensor  # uint8 [vectors], 1 to 8

    @property
    def top(self) -> torch.Tensor:
        """float32 [vectors]: the largest code."""
        return torch.exp2(self.bits.float()) - 1


def minmax_grid(vectors: torch.Tensor, bits: torch.Tensor) -> Grid:
    """The grid of each row of ``vectors`` (float32 [n, length]) with its own ``bits`` (uint8 [n], 1 to 8).

    The first and last code stand for the smallest and largest entry, 0 included in the range: a zero
    point then lies within the codes, which float16 holds to 1/8 of a code, and a constant vector is
    exact. An all-zero vector gets scale 1.
    """
    low = vectors.amin(dim=1).clamp(max=0)
    high = vectors.amax(dim=1).clamp(min=0)
    top = torch.exp2(bits.float()) - 1
    scale = (high - low) / top
    # Below the smallest normal number a division by the scale would not be exact enough to hit a code.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return Grid(scale=scale, zero=(-low / scale).to(torch.float16), bits=bits)


def round_to_grid(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """The nearest code of each value, as float32; all arguments float32 and broadcast together."""
    return torch.minimum((values / scale).add_(zero).round_().clamp_(min=0), top)


def quantize(vectors: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to nearest: float32 [n, length] -> uint8 codes [n, length]; row i on the grid's entry i."""
    codes = round_to_grid(vectors, grid.scale[:, None], grid.zero.float()[:, None], grid.top[:, None])
    return codes.to(torch.uint8)


def dequantize(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """uint8 codes [n, length] -> float32 [n, length]; the inverse of `quantize` up to the rounding."""
    return (codes.float() - grid.zero.float()[:, None]) * grid.scale[:, None]
