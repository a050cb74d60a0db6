"""A site with its tenants in an arena, and batches run through it by the Triton kernels.

Interpreted on the CPU (TRITON_INTERPRET=1), else compiled on a GPU, with inline assembly on NVIDIA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton

from tests.kernels.deltas import pack, relative_error
from vllm_prinmix.kernels import reference, segmented
from vllm_prinmix.kernels.descriptors import Arena, Part, SiteTables, columns, groups, whole_tiles
from vllm_prinmix.kernels.packed import Packed
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix
from vllm_prinmix.kernels.segments import Segments

Quantized = QuantizedFactors | QuantizedMatrix

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
ASM = DEVICE.type == "cuda" and torch.version.hip is None

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
        site.entries, site.parts = site.entries.to(DEVICE), site.parts.to(DEVICE)
        self.arena = used_arena(1 << 21)
        self.segments = Segments(max_tenants, rows, DEVICE)
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
        self.workspace = segmented.Workspace(rows, cols, *most, dtype=dtype, device=DEVICE)
        for tensor in (self.workspace.x, self.workspace.t, self.workspace.sums, self.workspace.partials):
            tensor.fill_(float("nan"))  # what no launch wrote must not be read

    def linear_(self, y: torch.Tensor, x: torch.Tensor, slots: np.ndarray) -> None:
        """x and y may be on the CPU, wherever the kernels run."""
        self.segments.set(slots)
        y_there = y.to(DEVICE)
        segmented.linear_(
            y_there,
            x.to(DEVICE),
            self.site,
            self.arena,
            self.segments,
            self.workspace,
            self.programs,
            asm=ASM,
        )
        y.copy_(y_there)


def used_arena(size: int) -> Arena:
    """Filled with 0x7F, as if it had been used before."""
    return Arena(torch.full((size,), 0x7F, dtype=torch.uint8, device=DEVICE))


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
