"""A site with its tenants in an arena, and batches run through it by the interpreted kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tests.kernels.deltas import pack, relative_error
from vllm_prinmix.kernels import reference, segmented
from vllm_prinmix.kernels.descriptors import Arena, Part, SiteTables, columns, groups, whole_tiles
from vllm_prinmix.kernels.packed import Packed
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix
from vllm_prinmix.kernels.segments import Segments

Quantized = QuantizedFactors | QuantizedMatrix

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Server:
    """``tenants``: slot -> a packed delta (or None) per part."""

    def __init__(
        self,
        site: SiteTables,
        tenants: Mapping[int, Sequence[Packed | None]],
        biases: Mapping[int, Sequence[torch.Tensor | None]] | None = None,
        rows: int = 320,
        max_tenants: int = 4,
        dtype: torch.dtype = torch.float32,
        programs: int = 3,
    ) -> None:
        self.site, self.dtype, self.programs = site, dtype, programs
        self.arena = Arena(torch.full((1 << 21,), 0x7F, dtype=torch.uint8))  # as if used before
        self.segments = Segments(max_tenants, rows)
        end = 0
        most = [1, 1]
        for slot, deltas in tenants.items():
            bias = biases[slot] if biases and slot in biases else [None] * len(deltas)
            whole = [None if d is None else whole_tiles(d) for d in deltas]
            parts = [Part(d, b) for d, b in zip(whole, bias, strict=True)]
            end = site.put(slot, parts, self.arena, end)
            need = [sum(columns(d) for d in whole), sum(groups(d) for d in whole)]
            most = [max(a, b) for a, b in zip(most, need, strict=True)]
        cols = site.col_blocks * 128
        self.workspace = segmented.Workspace(rows, cols, *most, dtype=dtype, device="cpu")
        for tensor in (self.workspace.x, self.workspace.t, self.workspace.sums, self.workspace.partials):
            tensor.fill_(float("nan"))  # what no launch wrote must not be read

    def linear_(self, y: torch.Tensor, x: torch.Tensor, slots: np.ndarray) -> None:
        self.segments.set(slots)
        segmented.linear_(
            y, x, self.site, self.arena, self.segments, self.workspace, self.programs, asm=False
        )


def inputs(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Not centred, as activations are not: what offsets leave behind must not grow with the mean."""
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) + 0.2).to(dtype)


def check(
    server: Server, tenants: Mapping[int, Sequence[Quantized | None]], slots: np.ndarray, seed: int = 0
) -> None:
    """One batch against the reference, each tenant's delta for itself; base rows must not change at all."""
    x = inputs(len(slots), server.site.cols, server.dtype, seed)
    width = sum(server.site.widths)
    y = torch.zeros(len(slots), width, dtype=torch.float32)
    server.linear_(y, x, slots)
    assert not y[slots < 0].any()
    for slot in np.unique(slots[slots >= 0]).tolist():
        mine = torch.from_numpy(slots == slot)
        for delta, first, n in zip(tenants[slot], server.site.firsts, server.site.widths, strict=True):
            found = y[mine, first : first + n]
            if delta is None:
                assert not found.any()
            else:
                expected = reference.linear(x[mine], delta)
                assert relative_error(found, expected) < TOLERANCE[server.dtype], (slot, first)


def serve(
    tenants: Mapping[int, Sequence[Quantized | None]], widths: Sequence[int], cols: int, **options: object
) -> Server:
    site = SiteTables(widths, cols, slots=max([4, *(s + 1 for s in tenants)]))
    packed = {s: [None if d is None else pack(d) for d in deltas] for s, deltas in tenants.items()}
    return Server(site, packed, **options)  # type: ignore[arg-type]
