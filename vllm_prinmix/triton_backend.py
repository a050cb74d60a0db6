"""Deltas added on a GPU: packed bytes in an arena with a place per slot, read by the Triton kernels.

The arena and all tables keep their place, so that captured CUDA graphs see the tenants that are in slots
now. Copies go to the stream that the model runs on: they are in order with the steps around them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_prinmix.backend import BASE, Backend, Site, TenantDelta
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels import packing, segmented
from vllm_prinmix.kernels.descriptors import NONE, Arena, SiteTables
from vllm_prinmix.kernels.segments import Segments
from vllm_prinmix.slot_image import SlotImage, lay_out, output_widths

# A slot is larger than the largest delta at start by this much, for deltas that come later.
ROOM = 1.05
INTERPRETER_PROGRAMS = 4  # the interpreter runs them one after the other
# Bytes. torch rounds pinned memory up to a power of two and hands it out again only whole: a tenant of 0.6 GB
# would take 1 GB. Pieces of this size fit, but for the last, and those that one tenant leaves serve another.
PIECE = 1 << 26


@dataclass(frozen=True)
class Prepared:
    """A tenant's image in host memory (pinned, for a GPU)."""

    image: SlotImage
    pieces: list[torch.Tensor]  # uint8 [`PIECE`]; the last one may be shorter


class TritonBackend(Backend):
    """See `Backend`. ``rows``: of a batch, at most; ``dtype``: of the activations, 16 or 32 bits wide.

    device: a GPU; the CPU only where Triton's interpreter runs the kernels (TRITON_INTERPRET=1).
    """

    def __init__(self, slots: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(slots)
        self.rows, self.dtype, self.device = rows, dtype, device
        on_gpu = device.type == "cuda"
        self.programs = segmented.programs_for(device) if on_gpu else INTERPRETER_PROGRAMS
        self.asm = on_gpu and torch.version.hip is None
        self.touched: set[int] = set()  # sites that some tenant changes; elsewhere nothing is launched
        self._batch = np.empty(0, dtype=np.int64)  # slots of the token rows

    def reserve(self, tenants: Iterable[TenantDelta]) -> None:
        """Allocate arena, tables and workspace. Raises PrinMixError when the device has not enough memory."""
        most_columns = most_groups = 1
        for delta in tenants:
            image = lay_out(delta, self.sites)
            self.slot_bytes = max(self.slot_bytes, image.nbytes)
            most_columns = max(most_columns, image.columns)
            most_groups = max(most_groups, image.groups)
            self.touched |= delta.keys()
        self.slot_bytes = packing.align(int(ROOM * self.slot_bytes))
        most_columns, most_groups = (math.ceil(ROOM * most) for most in (most_columns, most_groups))
        linear = [site for site in self.sites if site.kind == "linear"]
        cols = max([site.col_offset + site.cols for site in linear], default=1)
        try:
            self.arena = Arena(
                torch.zeros(max(self.slots * self.slot_bytes, 16), dtype=torch.uint8, device=self.device)
            )
            self.workspace = segmented.Workspace(
                self.rows, cols, most_columns, most_groups, self.dtype, self.device
            )
        except torch.OutOfMemoryError as error:
            raise PrinMixError(
                "the GPU has no room for the slots",
                where=f"--max-deltas {self.slots}",
                found=f"{self.slots} slots of {self.slot_bytes / 1e6:.1f} MB for the largest tenant",
                fix="lower --max-deltas",
            ) from error
        # Rows of 16 bytes or a multiple: Triton compiles a kernel anew for a pointer that is less aligned.
        shape = (len(self.sites), self.slots + self.slots % 2)
        self._entries = torch.full(shape, NONE, dtype=torch.int64, device=self.device)
        self._tables = {n: self._site_tables(n) for n in self.touched if self.sites[n].kind != "norm"}
        self._tokens, self._samples, self._prompt = (
            Segments(self.slots, self.rows, self.device) for _ in range(3)
        )

    def _site_tables(self, number: int) -> SiteTables:
        site = self.sites[number]
        turned = site.kind == "embedding"
        tables = SiteTables(
            output_widths(site),
            site.widths[0] if turned else site.cols,
            self.slots,
            self.device,
            (site.col_offset,) if turned else site.row_offsets,
            site.row_offsets[0] if turned else site.col_offset,
        )
        tables.entries = self._entries[number]  # all sites' in one tensor: one copy fills a slot
        return tables

    def warm_up(self) -> None:
        """Launch every kernel for every kind of arguments that requests bring, so that it is compiled.

        vLLM's own warm-up leaves the head out, and more where CUDA graphs are off.
        """
        nobody = np.full(1, BASE)
        self.set_batch(nobody, nobody, active=True)
        for rows in (1, segmented.DECODE_BATCH + 1):
            for site, number in {self.sites[n]: n for n in sorted(self.touched)}.items():
                self._launch(site, number, min(rows, self.rows))
        self.set_batch(nobody, nobody, active=False)

    def _launch(self, site: Site, number: int, rows: int) -> None:
        def zeros(cols: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.zeros(rows, cols, dtype=dtype, device=self.device)

        if site.kind == "norm":
            self.norm_(zeros(site.widths[0]), zeros(site.widths[0]), number, 1e-6)
        elif site.kind == "embedding":
            self.embedding_(zeros(site.cols), zeros(1, torch.int64)[:, 0], number)
        elif site.head:  # logits are in float32, and vLLM pads the vocabulary
            self.logits_(zeros(packing.align(sum(site.widths)), torch.float32), zeros(site.cols), number)
        else:
            self.linear_(zeros(sum(site.widths)), zeros(site.cols), number)

    def prepare(self, delta: TenantDelta) -> Prepared:
        image = lay_out(delta, self.sites)
        if not delta.keys() <= self.touched:
            raise PrinMixError(
                "the delta changes modules that no delta changed when the server started",
                found=f"{len(delta.keys() - self.touched)} such modules",
                fix="restart the server",
            )
        limits = (self.slot_bytes, self.workspace.columns, self.workspace.groups)
        needs = (image.nbytes, image.columns, image.groups)
        if any(need > limit for need, limit in zip(needs, limits, strict=True)):
            raise PrinMixError(
                f"the delta is more than {ROOM - 1:.0%} larger than any that the server found at start",
                found="{} bytes, {} columns, {} groups".format(*needs),
                expected="at most {}, {}, {}".format(*limits),
                fix="restart the server",
            )
        # Pinned through this rank's GPU: a new thread's is the first, where it would take memory for nothing.
        on_gpu = self.device.type == "cuda"
        sizes = [min(PIECE, image.tables_start - start) for start in range(0, image.tables_start, PIECE)]
        with torch.cuda.device(self.device if on_gpu else -1):
            pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for size in sizes]
        image.write(pieces)
        return Prepared(replace(image, tensors=[]), pieces)

    def activate(self, slot: int, prepared: Prepared) -> None:
        image, start = prepared.image, slot * self.slot_bytes
        position = start
        for piece in prepared.pieces:
            self.arena.data[position : position + piece.numel()].copy_(piece, non_blocking=True)
            position += piece.numel()
        end = start + image.tables_start
        tables = self._to_device(image.tables.at(start))
        self.arena.tables[end // 8 : end // 8 + tables.numel()] = tables
        self._entries[:, slot] = self._to_device(image.entries.at(start))

    def deactivate(self, slot: int) -> None:
        self._entries[:, slot] = NONE

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        found = torch.from_numpy(values)
        if self.device.type != "cuda":
            return found
        # Pinned memory is not used again before the copy from it is done: torch's allocator sees to that.
        return found.pin_memory().to(self.device, non_blocking=True)

    def _set_rows(self, tokens: np.ndarray, samples: np.ndarray) -> None:
        self._batch = tokens
        self._tokens.set(tokens)
        self._samples.set(samples)

    def linear_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        self._linear(y, x, site, self._tokens)

    def logits_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        start = self.prompt_start(x)
        if start is None:
            self._linear(y, x, site, self._samples)
            return
        window = self._batch[start : start + x.shape[0]]
        if (window > BASE).any():
            self._prompt.set(window)
            self._linear(y, x, site, self._prompt)

    def _linear(self, y: torch.Tensor, x: torch.Tensor, site: int, segments: Segments) -> None:
        if site in self.touched:
            tables = self._tables[site]
            segmented.linear_(y, x, tables, self.arena, segments, self.workspace, self.programs, self.asm)

    def embedding_(self, y: torch.Tensor, ids: torch.Tensor, site: int) -> None:
        if site in self.touched:
            tables, between = self._tables[site], self.workspace
            segmented.embedding_(y, ids, tables, self.arena, self._tokens, between, self.programs, self.asm)

    def norm_(self, y: torch.Tensor, x: torch.Tensor, site: int, eps: float) -> None:
        if site in self.touched:
            segmented.norm_(y, x, self._entries[site], self.arena, self._tokens, eps)
