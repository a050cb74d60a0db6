"""A tenant's delta as one piece of memory, laid out once and copied into whichever slot of the arena.

Everything that a slot holds lies at a fixed distance from the slot's start, so an image is made off the
engine's loop; only the tables, whose positions count from the arena's start, are moved to the slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_prinmix.backend import Site, SiteDelta, TenantDelta
from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.descriptors import (
    NONE,
    Part,
    columns,
    embedding_part,
    groups,
    site_table,
    whole_tiles,
)
from vllm_prinmix.kernels.packed import Packed, PackedFactors

UNIT = packing.ALIGNMENT  # bytes; slots start at multiples of it


@dataclass(frozen=True)
class Relative:
    """int64 values that grow linearly with the byte at which the slot starts."""

    at_zero: np.ndarray
    growth: np.ndarray  # per `UNIT` bytes

    def at(self, start: int) -> np.ndarray:
        """The values for a slot that starts at byte ``start`` of the arena."""
        return self.at_zero + self.growth * (start // UNIT)


@dataclass(frozen=True)
class SlotImage:
    """Where everything lies, in bytes from the slot's start.

    columns and groups: the most that any site needs of `segmented.Workspace`.
    """

    tensors: list[tuple[torch.Tensor, int]]
    tables: Relative  # of all sites, one after the other
    tables_start: int
    entries: Relative  # [sites]: where the kernels find a site's table or norm weight, -1 for nothing
    columns: int
    groups: int

    @property
    def nbytes(self) -> int:
        return self.tables_start + packing.align(8 * self.tables.at_zero.size)

    def write(self, pieces: Sequence[torch.Tensor]) -> None:
        """Copy the tensors. The tables depend on the slot and come later.

        pieces: uint8, together [`tables_start`]; all of one size, but for the last.
        """
        for tensor, start in self.tensors:
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            done = 0
            while done < raw.numel():
                number, at = divmod(start + done, pieces[0].numel())
                count = min(raw.numel() - done, pieces[number].numel() - at)
                pieces[number][at : at + count] = raw[done : done + count]
                done += count


def lay_out(delta: TenantDelta, sites: Sequence[Site]) -> SlotImage:
    """The image of a tenant's delta; its tensors may be on the meta device, when only sizes are wanted."""
    tensors: list[tuple[torch.Tensor, int]] = []
    places: dict[int, int] = {}  # id of a tensor -> its byte; a tied head and its embedding share them
    filled: dict[int, Packed] = {}
    end = 0

    def place(tensor: torch.Tensor) -> int:
        nonlocal end
        if id(tensor) not in places:
            places[id(tensor)] = end
            tensors.append((tensor, end))
            end = packing.align(end + tensor.nbytes)
        return places[id(tensor)]

    def fill(part: Packed | None) -> Packed | None:
        if part is not None and id(part) not in filled:
            filled[id(part)] = whole_tiles(part)
        return None if part is None else filled[id(part)]

    lines: list[tuple[int, list[Part]]] = []
    weights: dict[int, int] = {}
    most_columns = most_groups = 0
    for number, found in sorted(delta.items()):
        site = sites[number]
        if site.kind == "norm":
            if found.weight is not None:
                weights[number] = place(found.weight)
            continue
        parts = _parts(site, found, [fill(part) for part in found.parts])
        for part in parts:
            for tensor in _tensors(part):
                place(tensor)
        most_columns = max(most_columns, sum(columns(part.delta) for part in parts))
        most_groups = max(most_groups, sum(groups(part.delta) for part in parts))
        lines.append((number, parts))

    tables, growth, table_places = [], [], {}
    position = end
    for number, parts in lines:
        widths = output_widths(sites[number])
        firsts = [sum(widths[:i]) for i in range(len(widths))]
        zero = site_table(parts, firsts, lambda tensor: places[id(tensor)])
        one = site_table(parts, firsts, lambda tensor: places[id(tensor)] + UNIT)
        tables.append(zero)
        growth.append(one - zero)
        table_places[number] = position
        position += zero.nbytes
    entries = np.full(len(sites), NONE, dtype=np.int64)
    steps = np.zeros(len(sites), dtype=np.int64)
    for known, size in ((table_places, 8), (weights, 4)):
        for number, byte in known.items():
            entries[number], steps[number] = byte // size, UNIT // size
    return SlotImage(
        tensors,
        Relative(_joined(tables), _joined(growth)),
        end,
        Relative(entries, steps),
        most_columns,
        most_groups,
    )


def output_widths(site: Site) -> tuple[int, ...]:
    """Columns of each slice of y: an embedding's y is a row of its weight."""
    return (site.cols,) if site.kind == "embedding" else site.widths


def _parts(site: Site, found: SiteDelta, filled: Sequence[Packed | None]) -> list[Part]:
    if site.kind == "embedding":
        return [Part() if part is None else embedding_part(part) for part in filled]
    parts, start = [], 0
    for part, width in zip(filled or [None] * len(site.widths), site.widths, strict=True):
        # A clone, so that a slice of the bias is a tensor with a place of its own.
        bias = None if found.bias is None else found.bias[start : start + width].clone()
        parts.append(Part(part, bias))
        start += width
    return parts


def _tensors(part: Part) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    if isinstance(part.delta, PackedFactors):
        found += part.delta.tensors()
    elif part.delta is not None:
        found += [part.delta.codes, part.delta.scale, part.delta.zero]
    return found + [extra for extra in (part.bias, part.lookup_scale) if extra is not None]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
