"""Tables that tell the Triton kernels where a slot's packed planes lie.

All packed bytes of all slots are in one *arena*. For every site and slot there is a *table* of 64-bit
integers, in the arena too, and per site one tensor with the tables' positions (`SiteTables`): what
changes when a tenant comes or goes is memory that kernels read, never their arguments, so captured CUDA
graphs stay valid.

A table has a header, a line per part (slice of a packed layer's output: q, k, v), and lines of two sorts:

* *groups*, the tasks of the first product: up to 64 directions of one class, with the planes of their V
  codes;
* *runs*, the steps of the second: the directions of a class, one line per plane of its U codes.

Kernels read whole tiles only: `whole_tiles` fills up the short last tile of each class with zeros on the
way into memory, since rows of fewer than 16 words can be neither read 16 bytes at a time nor copied
asynchronously (2.5 % more bytes for generated deltas of a 7B model, 13 % of a 0.5B one). t, between the
two products, has a column per direction and a multiple
of 64 per class; columns in excess are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.packed import Packed, PackedClass, PackedFactors, PackedMatrix

GROUP = 64  # directions of a task, at most
NONE = -1

# Fields of a table's lines. Positions of planes count 16 bytes of the arena, and columns of t are in
# sixteens: what is multiplied in a kernel is known there to be aligned. Other positions count elements of
# the arena seen as float32 (scale, bias) or float16 (zero points, row scale).
HEADER = ("groups", "first_group")
PART = ("runs", "first_run", "groups", "first_group", "row_scale", "bias", "lookup_scale")
RUN = ("column", "directions", "width", "place", "position")
GROUP_FIELDS = (
    *("column", "directions", "scale", "v_zero", "u_zero"),
    *("u_width_1", "u_width_2", "u_width_4"),  # sum of 2^place over U's planes of each width
    "output",  # first output column where t is the output itself (`PackedMatrix`), else -1
    *("planes", *(f"{name}{i}" for i in range(3) for name in ("width", "place", "position"))),
)

Address = Callable[[torch.Tensor], int]


@dataclass(frozen=True)
class Arena:
    """The packed bytes of all slots, seen as each type in them. ``data`` is uint8, a multiple of 16."""

    data: torch.Tensor

    @property
    def words(self) -> torch.Tensor:
        return self.data.view(torch.int16)

    @property
    def tables(self) -> torch.Tensor:
        return self.data.view(torch.int64)

    @property
    def floats(self) -> torch.Tensor:
        return self.data.view(torch.float32)

    @property
    def halves(self) -> torch.Tensor:
        return self.data.view(torch.float16)

    def put(self, tensors: Sequence[torch.Tensor], start: int) -> tuple[dict[int, int], int]:
        """Copy tensors to byte ``start`` (a multiple of 16) and on: ({data_ptr: byte position}, end)."""
        places = {}
        for tensor in tensors:
            if tensor.numel():
                raw = tensor.contiguous().view(torch.uint8)
                self.data[start : start + raw.numel()].copy_(raw, non_blocking=True)
                places[tensor.data_ptr()] = start
                start = packing.align(start + raw.numel())
        return places, start


@dataclass(frozen=True)
class Part:
    """One slice of a site's output, for one tenant."""

    delta: Packed | None = None
    bias: torch.Tensor | None = None  # float32 [rows], added to the base's
    lookup_scale: torch.Tensor | None = None  # float16 [vocabulary]: an embedding's row scale


def embedding_part(delta: Packed) -> Part:
    """An embedding's delta for a site with widths (hidden,) and cols the vocabulary: dW^T, looked up in U."""
    if isinstance(delta, PackedMatrix):
        return Part(delta)
    classes = tuple(PackedClass(c.u_bits, c.v_bits, c.directions, c.u, c.v) for c in delta.classes)
    turned = replace(
        delta,
        rows=delta.cols,
        cols=delta.rows,
        classes=classes,
        v_zero=delta.u_zero,
        u_zero=delta.v_zero,
        row_scale=None,
    )
    return Part(turned, lookup_scale=delta.row_scale)


def whole_tiles(delta: Packed) -> Packed:
    """The same delta with the last tile of each class filled up with zeros, as the kernels read it."""
    if isinstance(delta, PackedMatrix):
        codes = _filled(delta.codes, delta.bits, delta.rows.length, delta.cols.blocks)
        return replace(delta, codes=codes)
    classes = tuple(
        replace(
            c,
            v=_filled(c.v, c.v_bits, c.directions, delta.cols.blocks),
            u=_filled(c.u, c.u_bits, c.directions, delta.rows.blocks),
        )
        for c in delta.classes
    )
    return replace(delta, classes=classes)


def _filled(codes: torch.Tensor, bits: int, directions: int, blocks: int) -> torch.Tensor:
    short = -directions % packing.TILE
    if not short:
        return codes
    parts = []
    for plane, width in packing.split_planes(codes, bits, directions, blocks):
        *full, last = packing.split_tiles(plane, width, directions, blocks)
        parts += [tile.reshape(-1) for tile in (*full, torch.nn.functional.pad(last, (0, short)))]
    return torch.cat(parts).view(torch.uint8)


def columns(delta: Packed | None) -> int:
    """Columns of t that a delta needs."""
    if not isinstance(delta, PackedFactors):
        return 0
    return sum(-(-c.directions // GROUP) * GROUP for c in delta.classes)


def groups(delta: Packed | None) -> int:
    """Tasks of the first product."""
    if isinstance(delta, PackedMatrix):
        return -(-delta.rows.length // GROUP)
    return columns(delta) // GROUP


def site_table(parts: Sequence[Part], firsts: Sequence[int], address: Address) -> np.ndarray:
    """int64 table of one slot at one site.

    ``firsts``: first output column of each part; ``address``: byte position in the arena of a tensor of
    ``delta.tensors()`` (or a matrix's codes, scale and zero), a multiple of 16, or of a bias (float32).
    """
    groups: list[list[int]] = []
    runs: list[list[int]] = []
    headers, column = [], 0
    for part, first in zip(parts, firsts, strict=True):
        before = len(runs), len(groups)
        row_scale = NONE
        if isinstance(part.delta, PackedFactors):
            if part.delta.row_scale is not None:
                row_scale = address(part.delta.row_scale) // 2
            column = _factors(part.delta, column, groups, runs, address)
        elif isinstance(part.delta, PackedMatrix):
            _matrix(part.delta, first, groups, address)
        bias = NONE if part.bias is None else address(part.bias) // 4
        summed = len(groups) - before[1] if len(runs) > before[0] else 0
        lookup = NONE if part.lookup_scale is None else address(part.lookup_scale) // 2
        headers.append([len(runs) - before[0], before[0], summed, before[1], row_scale, bias, lookup])
    start = len(HEADER) + len(parts) * len(PART)
    for header in headers:
        header[1] = start + len(groups) * len(GROUP_FIELDS) + header[1] * len(RUN)
    lines = [[len(groups), start], *headers, *groups, *runs]
    return np.array([value for line in lines for value in line], dtype=np.int64)


def _planes(codes: torch.Tensor, bits: int, directions: int, blocks: int, address: Address) -> list:
    """(width, place, position) of each plane of whole tiles."""
    position, place, planes = address(codes) // packing.ALIGNMENT, 0, []
    for width in packing.PLANES[bits]:
        planes.append((width, place, position))
        position += -(-directions // packing.TILE) * packing.TILE * blocks * width
        place += width
    return planes


def _groups(planes: list, directions: int, blocks: int) -> Iterator[tuple[int, int, list[int]]]:
    """(first direction, directions, fields from ``planes`` on) of each task of a class."""
    for first in range(0, directions, GROUP):
        moved = [(width, place, at + first * blocks * width) for width, place, at in planes]
        unused = [(1, 0, 0)] * (3 - len(planes))
        fields = [len(planes), *(value for plane in moved + unused for value in plane)]
        yield first, min(GROUP, directions - first), fields


def _factors(delta: PackedFactors, column: int, groups: list, runs: list, address: Address) -> int:
    """Append the groups and runs of a part whose first column of t is ``column``; the next free column."""
    scale, v_zero, u_zero = address(delta.scale) // 4, address(delta.v_zero) // 2, address(delta.u_zero) // 2
    done = 0  # directions of earlier classes
    for c in delta.classes:
        v = _planes(c.v, c.v_bits, c.directions, delta.cols.blocks, address)
        u = _planes(c.u, c.u_bits, c.directions, delta.rows.blocks, address)
        weights = [sum(1 << place for width, place, _ in u if width == w) for w in (1, 2, 4)]
        runs += [[column // packing.TILE, c.directions, *plane] for plane in u]
        for first, n, fields in _groups(v, c.directions, delta.cols.blocks):
            at = done + first
            tables = [scale + at, v_zero + at, u_zero + at]
            groups.append([(column + first) // packing.TILE, n, *tables, *weights, NONE, *fields])
        column += -(-c.directions // GROUP) * GROUP
        done += c.directions
    return column


def _matrix(delta: PackedMatrix, first_output: int, groups: list, address: Address) -> None:
    """Append the groups of a part without SVD: its rows are directions whose t is the output itself."""
    rows = delta.rows.length
    planes = _planes(delta.codes, delta.bits, rows, delta.cols.blocks, address)
    scale, zero = address(delta.scale) // 4, address(delta.zero) // 2
    for first, n, fields in _groups(planes, rows, delta.cols.blocks):
        tables = [scale + first, zero + first, zero + first]
        groups.append([0, n, *tables, 0, 0, 0, first_output + first, *fields])


class SiteTables:
    """Where the tables of a site's slots lie; the deltas of one module (or packed layer) of the model.

    ``widths``: rows of each part of the output; ``row_offsets``: where its packed rows start (tensor
    parallelism: `Extent.offset`); ``cols`` and ``col_offset`` likewise for the input.
    """

    def __init__(
        self,
        widths: Sequence[int],
        cols: int,
        slots: int,
        device: torch.device | str = "cpu",
        row_offsets: Sequence[int] | None = None,
        col_offset: int = 0,
    ) -> None:
        self.widths, self.cols, self.col_offset = tuple(widths), cols, col_offset
        self.row_offsets = tuple(row_offsets) if row_offsets is not None else (0,) * len(self.widths)
        self.col_blocks = packing.blocks(col_offset + cols)
        self.row_blocks = [packing.blocks(o + w) for o, w in zip(self.row_offsets, self.widths, strict=True)]
        self.firsts = tuple(int(x) for x in np.cumsum([0, *self.widths])[:-1])
        # int64 [parts, 4]: first output column, rows, offset of the packed rows, blocks
        self.parts = torch.tensor(
            list(zip(self.firsts, self.widths, self.row_offsets, self.row_blocks, strict=True)),
            dtype=torch.int64,
            device=device,
        )
        # int64 [slots]: position in the arena seen as int64; -1 where the slot leaves this site as it is
        self.entries = torch.full((slots,), NONE, dtype=torch.int64, device=device)

    def set(self, slot: int, table_position: int | None) -> None:
        """``table_position``: the byte (a multiple of 8) in the arena where the slot's table was put."""
        self.entries[slot] = NONE if table_position is None else table_position // 8

    def put(self, slot: int, parts: Sequence[Part], arena: Arena, start: int) -> int:
        """Copy a slot's deltas (`whole_tiles`) and their table to byte ``start`` on; the next free byte."""
        tensors: list[torch.Tensor] = []
        for part in parts:
            if isinstance(part.delta, PackedFactors):
                tensors += part.delta.tensors()
            elif isinstance(part.delta, PackedMatrix):
                tensors += [part.delta.codes, part.delta.scale, part.delta.zero]
            tensors += [extra for extra in (part.bias, part.lookup_scale) if extra is not None]
        places, start = arena.put(tensors, start)
        table = site_table(parts, self.firsts, lambda t: places.get(t.data_ptr(), 0))
        _, end = arena.put([torch.from_numpy(table)], start)
        self.set(slot, start)
        return end
