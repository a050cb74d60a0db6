"""A module's delta as it lies in memory: packed planes with their tables, sliced for tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_prinmix.kernels import packing


@dataclass(frozen=True)
class Extent:
    """The codes ``offset`` to ``offset + length`` of each packed direction.

    The offset is below 128: a tensor-parallel slice may start inside a block, and whole blocks are kept.
    """

    length: int
    offset: int = 0

    @property
    def blocks(self) -> int:
        return packing.blocks(self.offset + self.length)

    def cut(self, start: int, stop: int) -> tuple[int, int, Extent]:
        """(first block, last block excluded, extent within them) of the codes ``start`` to ``stop``."""
        begin, end = self.offset + start, self.offset + stop
        first = begin // packing.BLOCK
        return first, packing.blocks(end), Extent(stop - start, begin - first * packing.BLOCK)


@dataclass(frozen=True)
class PackedClass:
    """The packed codes of one bit class."""

    v_bits: int
    u_bits: int
    directions: int
    v: torch.Tensor  # uint8 [directions * row_bytes(v_bits, cols)]
    u: torch.Tensor  # uint8 [directions * row_bytes(u_bits, rows)]


@dataclass(frozen=True)
class PackedFactors:
    """dW[rows, cols] as packed directions; the directions of all classes follow one another in the tables."""

    rows: Extent
    cols: Extent
    classes: tuple[PackedClass, ...]
    scale: torch.Tensor  # float32 [directions]
    v_zero: torch.Tensor  # float16 [directions]
    u_zero: torch.Tensor  # float16 [directions]
    row_scale: torch.Tensor | None  # float16 [rows]

    @classmethod
    def from_payload(
        cls,
        payload: torch.Tensor,
        shape: tuple[int, int],
        classes: list[tuple[int, int, int]],
        row_scale: bool,
    ) -> PackedFactors:
        """Views into a payload (docs/format.md); ``classes`` are (v_bits, u_bits, directions). No copy."""
        rows, cols = shape
        start, packed = 0, []
        for v_bits, u_bits, n in classes:
            middle = start + n * packing.row_bytes(v_bits, cols)
            end = middle + n * packing.row_bytes(u_bits, rows)
            packed.append(PackedClass(v_bits, u_bits, n, payload[start:middle], payload[middle:end]))
            start = end
        n = sum(c.directions for c in packed)
        table = payload[start:]
        return cls(
            rows=Extent(rows),
            cols=Extent(cols),
            classes=tuple(packed),
            scale=table[: 4 * n].view(torch.float32),
            v_zero=table[4 * n : 6 * n].view(torch.float16),
            u_zero=table[6 * n : 8 * n].view(torch.float16),
            row_scale=table[8 * n : 8 * n + 2 * rows].view(torch.float16) if row_scale else None,
        )

    def slice_rows(self, start: int, stop: int) -> PackedFactors:
        """Output rows ``start`` to ``stop``: U is cut, V is kept whole."""
        first, last, extent = self.rows.cut(start, stop)
        classes = tuple(
            replace(c, u=packing.cut_blocks(c.u, c.u_bits, c.directions, self.rows.blocks, first, last))
            for c in self.classes
        )
        row_scale = None if self.row_scale is None else self.row_scale[start:stop]
        return replace(self, rows=extent, classes=classes, row_scale=row_scale)

    def slice_cols(self, start: int, stop: int) -> PackedFactors:
        """Input columns ``start`` to ``stop``: V is cut, U is kept whole."""
        first, last, extent = self.cols.cut(start, stop)
        classes = tuple(
            replace(c, v=packing.cut_blocks(c.v, c.v_bits, c.directions, self.cols.blocks, first, last))
            for c in self.classes
        )
        return replace(self, cols=extent, classes=classes)

    def tensors(self) -> list[torch.Tensor]:
        parts = [t for c in self.classes for t in (c.v, c.u)] + [self.scale, self.v_zero, self.u_zero]
        return parts if self.row_scale is None else [*parts, self.row_scale]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def to(self, device: torch.device) -> PackedFactors:
        return replace(
            self,
            classes=tuple(replace(c, v=c.v.to(device), u=c.u.to(device)) for c in self.classes),
            scale=self.scale.to(device),
            v_zero=self.v_zero.to(device),
            u_zero=self.u_zero.to(device),
            row_scale=None if self.row_scale is None else self.row_scale.to(device),
        )


@dataclass(frozen=True)
class PackedMatrix:
    """dW[rows, cols] without SVD: packed codes along the columns, a scale and a zero point per row."""

    rows: Extent
    cols: Extent
    bits: int
    codes: torch.Tensor  # uint8 [rows * row_bytes(bits, cols)]
    scale: torch.Tensor  # float32 [rows]
    zero: torch.Tensor  # float16 [rows]

    @classmethod
    def from_payload(cls, payload: torch.Tensor, shape: tuple[int, int], bits: int) -> PackedMatrix:
        """Views into a payload (docs/format.md). No copy."""
        rows, cols = shape
        size = rows * packing.row_bytes(bits, cols)
        table = payload[size:]
        scale, zero = table[: 4 * rows].view(torch.float32), table[4 * rows : 6 * rows].view(torch.float16)
        return cls(Extent(rows), Extent(cols), bits, payload[:size], scale, zero)

    def slice_rows(self, start: int, stop: int) -> PackedMatrix:
        """Output rows ``start`` to ``stop``; rows lie 16 to a tile, so the slice is packed anew."""
        codes = packing.unpack(self.codes, self.bits, self.rows.length, self.cols.blocks * packing.BLOCK)
        return replace(
            self,
            rows=Extent(stop - start),
            codes=packing.pack(codes[start:stop], self.bits),
            scale=self.scale[start:stop],
            zero=self.zero[start:stop],
        )

    def slice_cols(self, start: int, stop: int) -> PackedMatrix:
        """Input columns ``start`` to ``stop``."""
        first, last, extent = self.cols.cut(start, stop)
        codes = packing.cut_blocks(self.codes, self.bits, self.rows.length, self.cols.blocks, first, last)
        return replace(self, cols=extent, codes=codes)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def to(self, device: torch.device) -> PackedMatrix:
        return replace(
            self, codes=self.codes.to(device), scale=self.scale.to(device), zero=self.zero.to(device)
        )


Packed = PackedFactors | PackedMatrix
