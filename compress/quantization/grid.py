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


CLIPPED_GRIDS = 4  # how many `clipped_grids` gives
# The half-range of the best uniform grid for normally distributed entries, in standard deviations, by bits
# (Max, "Quantizing for minimum distortion", 1960, table II, as range of the outermost cells' middles).
NORMAL_RANGE = {1: 0.798, 2: 1.494, 3: 2.051, 4: 2.514, 5: 2.913, 6: 3.262, 7: 3.576, 8: 3.862}


def clipped_grids(vectors: torch.Tensor, bits: torch.Tensor) -> list[Grid]:
    """Grids for ``vectors`` (float32 [n, K]) at their ``bits`` (uint8 [n]) that clip the tails differently.

    Few bits are better spent on the many entries than on the few large ones, but not in every vector:
    which grid is best is for the caller to find out. The first is `minmax_grid`.
    """
    widest = minmax_grid(vectors, bits)
    mean, deviation = vectors.mean(dim=1), vectors.std(dim=1, unbiased=False)
    low, high = vectors.amin(dim=1), vectors.amax(dim=1)
    normal = torch.tensor([0.0, *NORMAL_RANGE.values()], device=vectors.device)[bits.long()]
    ranges = [(0.8 * low, 0.8 * high)]
    for spread in (1.0, 1.3):
        reach = spread * normal * deviation
        ranges.append((mean - reach, mean + reach))
    return [widest, *(_between(low, high, bits) for low, high in ranges)]


def _between(low: torch.Tensor, high: torch.Tensor, bits: torch.Tensor) -> Grid:
    """The grid whose first and last code stand for ``low`` and ``high``, float32 [n] each."""
    scale = (high - low) / (torch.exp2(bits.float()) - 1)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zero = (-low / scale).clamp(-2048, 2048)  # float16 holds integers exactly up to here
    return Grid(scale=scale, zero=zero.to(torch.float16), bits=bits)
