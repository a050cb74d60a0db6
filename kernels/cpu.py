"""The CPU path: products with packed deltas in float32, unpacking one bit class at a time, in passing."""

from __future__ import annotations

import torch

from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.packed import Extent, Packed, PackedFactors, PackedMatrix


def linear(x: torch.Tensor, delta: Packed) -> torch.Tensor:
    """x [tokens, cols] (any float dtype) -> x dW^T, float32 [tokens, rows]."""
    x = x.float()
    if isinstance(delta, PackedMatrix):
        codes = _unpack(delta.codes, delta.bits, delta.rows.length, delta.cols)
        return (x @ codes.T - x.sum(1, keepdim=True) * delta.zero.float()) * delta.scale
    return expand(shrink(x, delta), delta)


def shrink(x: torch.Tensor, delta: PackedFactors) -> torch.Tensor:
    """x [tokens, cols] float32 -> t = scale * (q_V x - v_zero * sum(x)), float32 [tokens, directions]."""
    parts = [x @ _unpack(c.v, c.v_bits, c.directions, delta.cols).T for c in delta.classes]
    products = torch.cat(parts, dim=1) if parts else x.new_zeros(x.shape[0], 0)
    return (products - x.sum(1, keepdim=True) * delta.v_zero.float()) * delta.scale


def expand(t: torch.Tensor, delta: PackedFactors) -> torch.Tensor:
    """t [tokens, directions] float32 -> U t, float32 [tokens, rows]; the scales are in t already."""
    # One number per token stands for all zero points: sum_i t_i (q_i - z_i) = sum_i t_i q_i - sum_i t_i z_i.
    y = -(t @ delta.u_zero.float())[:, None].expand(-1, delta.rows.length).contiguous()
    start = 0
    for c in delta.classes:
        y.addmm_(t[:, start : start + c.directions], _unpack(c.u, c.u_bits, c.directions, delta.rows))
        start += c.directions
    return y if delta.row_scale is None else y * delta.row_scale.float()


def embedding(ids: torch.Tensor, delta: Packed) -> torch.Tensor:
    """ids [tokens], each below rows -> rows of dW, float32 [tokens, cols]. Only these rows are unpacked."""
    if isinstance(delta, PackedMatrix):
        codes = _unpack(delta.codes, delta.bits, delta.rows.length, delta.cols)[ids]
        return (codes - delta.zero.float()[ids][:, None]) * delta.scale[ids][:, None]
    t = gather(ids, delta)
    y = -(t @ delta.v_zero.float())[:, None].expand(-1, delta.cols.length).contiguous()
    start = 0
    for c in delta.classes:
        y.addmm_(t[:, start : start + c.directions], _unpack(c.v, c.v_bits, c.directions, delta.cols))
        start += c.directions
    return y


def gather(ids: torch.Tensor, delta: PackedFactors) -> torch.Tensor:
    """ids [tokens] -> t = scale * (q_U - u_zero) of these rows, float32 [tokens, directions]."""
    parts = [_gather(c.u, c.u_bits, c.directions, delta.rows, ids) for c in delta.classes]
    codes = torch.cat(parts, dim=1) if parts else torch.zeros(ids.shape[0], 0, device=ids.device)
    t = (codes - delta.u_zero.float()) * delta.scale
    return t if delta.row_scale is None else t * delta.row_scale.float()[ids][:, None]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [tokens, hidden] -> RMSNorm(x) times weight [hidden], in float32, rounded once to x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _unpack(data: torch.Tensor, bits: int, directions: int, extent: Extent) -> torch.Tensor:
    """float32 codes [directions, extent.length]."""
    return packing.unpack(data, bits, directions, extent.length, extent.offset).float()


def _gather(
    data: torch.Tensor, bits: int, directions: int, extent: Extent, positions: torch.Tensor
) -> torch.Tensor:
    """float32 codes [positions, directions] at the given positions of every direction."""
    at = positions.long() + extent.offset
    block, within = at // packing.BLOCK, at % packing.BLOCK
    codes, shift = None, 0
    for plane, width in packing.split_planes(data, bits, directions, extent.blocks):
        words = 8 * width
        tiles = [
            tile[:, block, within % words]
            .transpose(0, 1)
            .flatten(1)  # [positions, tiles * directions in tile]
            for tile in packing.split_tiles(plane, width, directions, extent.blocks)
        ]
        part = (torch.cat(tiles, dim=1).int() >> (within // words * width)[:, None]) & ((1 << width) - 1)
        codes = part << shift if codes is None else codes | part << shift
        shift += width
    assert codes is not None
    return codes.float()
