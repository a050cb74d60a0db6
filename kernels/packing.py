"""Packing of integer codes into bit planes: the byte layout of docs/format.md, section "Planes".

A matrix of codes, one row per direction, is split by value into planes of 4, 2 and 1 bits (`PLANES`).
Within a plane a direction's codes are cut into blocks of 128. A block is 8*w little-endian 16-bit words
(w: the plane's width), and word j holds the codes j, j + 8w, j + 16w, ..., lowest bits first: one shift
and mask of the whole word array yields consecutive codes, and pairs of words sit in one register.
Directions are grouped in tiles of 16; memory order is [tile][block][word][direction in tile], the last
tile simply shorter. Only a direction's length is padded (to 128), never the number of directions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 128  # codes per block
TILE = 16  # directions per tile
ALIGNMENT = 16  # bytes; every plane and every payload is a multiple of it

# Widths of the planes of a code, from the least significant bits up.
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (4, 4),
}

# Per direction: float32 scale, float16 zero point of V, float16 zero point of U.
DIRECTION_BYTES = 8


def blocks(length: int) -> int:
    """Number of 128-code blocks that hold ``length`` codes."""
    return -(-length // BLOCK)


def row_bytes(bits: int, length: int) -> int:
    """Packed bytes of one direction's ``length`` codes of ``bits`` bits (0 bits: 0 bytes)."""
    return blocks(length) * BLOCK // 8 * bits


def align(size: int) -> int:
    """``size`` bytes rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def factors_bytes(v_bits: list[int], u_bits: list[int], rows: int, cols: int, row_scale: bool = False) -> int:
    """Payload bytes of a module stored as factors: codes, direction table, row scales and padding.

    ``v_bits`` and ``u_bits`` have one entry per stored direction (1 to 8).
    """
    planes = sum(row_bytes(v, cols) + row_bytes(u, rows) for v, u in zip(v_bits, u_bits, strict=True))
    return planes + align(DIRECTION_BYTES * len(v_bits) + (2 * rows if row_scale else 0))


def matrix_bytes(bits: int, rows: int, cols: int) -> int:
    """Payload bytes of a module stored without SVD: codes, float32 scale and float16 zero point per row."""
    return rows * row_bytes(bits, cols) + align(6 * rows)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [directions, length], each below 2**bits -> uint8 [directions * row_bytes(bits, length)].

    The planes follow one another, least significant first.
    Raises ValueError where a code does not fit ``bits``.
    """
    if codes.numel() and not codes.is_meta and int(codes.max()) >> bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    length = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, blocks(length) * BLOCK - length)).to(torch.int32)
    shift, planes = 0, []
    for width in PLANES[bits]:
        planes.append(_pack_plane((padded >> shift) & ((1 << width) - 1), width))
        shift += width
    return torch.cat(planes)


def unpack(data: torch.Tensor, bits: int, directions: int, length: int, offset: int = 0) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes [directions, length], skipping the first ``offset`` codes.

    ``data`` is uint8 [directions * row_bytes(bits, offset + length)].
    """
    n_blocks = blocks(offset + length)
    codes, shift = None, 0
    for plane, width in split_planes(data, bits, directions, n_blocks):
        part = _unpack_plane(plane, width, directions, n_blocks) << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes[:, offset : offset + length]


def split_planes(
    data: torch.Tensor, bits: int, directions: int, n_blocks: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """(plane as int16 words, width) for each plane of ``data``, without a copy."""
    words, start = data.view(torch.int16), 0
    for width in PLANES[bits]:
        size = directions * n_blocks * 8 * width
        yield words[start : start + size], width
        start += size


def split_tiles(plane: torch.Tensor, width: int, directions: int, n_blocks: int) -> list[torch.Tensor]:
    """Views of a plane's words: full tiles [tiles, blocks, 8*width, 16], then the short [1, ..., rest]."""
    words = 8 * width
    full, rest = divmod(directions, TILE)
    cut = full * n_blocks * words * TILE
    views = []
    if full:
        views.append(plane[:cut].view(full, n_blocks, words, TILE))
    if rest:
        views.append(plane[cut:].view(1, n_blocks, words, rest))
    return views


def cut_blocks(
    data: torch.Tensor, bits: int, directions: int, n_blocks: int, first: int, last: int
) -> torch.Tensor:
    """Packed bytes of blocks ``first`` (included) to ``last`` (excluded) of every direction: a TP slice."""
    if (first, last) == (0, n_blocks):
        return data
    parts = [
        tile[:, first:last].reshape(-1)
        for plane, width in split_planes(data, bits, directions, n_blocks)
        for tile in split_tiles(plane, width, directions, n_blocks)
    ]
    return torch.cat(parts).view(torch.uint8)


def _pack_plane(codes: torch.Tensor, width: int) -> torch.Tensor:
    """int32 codes [directions, padded length] below 2**width -> uint8 bytes of the plane."""
    directions, words = codes.shape[0], 8 * width
    per_word = BLOCK // words
    cut = codes.view(directions, codes.shape[1] // BLOCK, per_word, words)
    shifts = torch.arange(per_word, device=codes.device, dtype=torch.int32) * width
    # [directions, blocks, words]; the narrowing keeps the low 16 bits
    packed = (cut << shifts[:, None]).sum(dim=2, dtype=torch.int32).to(torch.int16)
    full = directions // TILE * TILE
    tiles = [packed[:full].view(full // TILE, TILE, *packed.shape[1:]).permute(0, 2, 3, 1).reshape(-1)]
    tiles.append(packed[full:].permute(1, 2, 0).reshape(-1))
    return torch.cat(tiles).view(torch.uint8)


def _unpack_plane(plane: torch.Tensor, width: int, directions: int, n_blocks: int) -> torch.Tensor:
    """int16 words of one plane -> uint8 codes [directions, n_blocks * 128] below 2**width."""
    words = 8 * width
    per_word = BLOCK // words
    shifts = torch.arange(per_word, device=plane.device, dtype=torch.int16) * width
    mask = (1 << width) - 1
    parts = []
    for tile in split_tiles(plane, width, directions, n_blocks):
        codes = (tile[:, :, None] >> shifts[:, None, None]) & mask  # [tiles, blocks, per_word, words, n]
        parts.append(codes.to(torch.uint8).permute(0, 4, 1, 2, 3).reshape(-1, n_blocks * BLOCK))
    if not parts:
        return torch.empty(0, n_blocks * BLOCK, dtype=torch.uint8, device=plane.device)
    return torch.cat(parts)
