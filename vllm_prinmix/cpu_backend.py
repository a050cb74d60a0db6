"""Deltas added on the CPU: by the compiled kernels where these can do it, by torch's operators elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_prinmix.backend import Backend, Site, SiteDelta, TenantDelta
from vllm_prinmix.kernels import cpu, native
from vllm_prinmix.kernels.packed import PackedFactors


@dataclass
class Rows:
    """Which rows of a batch belong to which tenant: (slot, indices), base rows in none."""

    groups: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, slots: np.ndarray) -> Rows:
        present = np.unique(slots)
        return cls([(int(s), torch.from_numpy(np.flatnonzero(slots == s))) for s in present[present >= 0]])

    def window(self, start: int, length: int) -> Rows:
        """The same for a slice of the rows."""
        cut = [(slot, rows[(rows >= start) & (rows < start + length)] - start) for slot, rows in self.groups]
        return Rows([(slot, rows) for slot, rows in cut if rows.numel()])


@dataclass
class Prepared:
    """A site's delta, and its parts as the compiled kernels take them, where these can do all of them."""

    delta: SiteDelta
    compiled: native.SiteFactors | None

    @classmethod
    def of(cls, site: Site, delta: SiteDelta) -> Prepared:
        starts = itertools.accumulate(site.widths[:-1], initial=0)
        parts = [(part, start) for part, start in zip(delta.parts, starts, strict=False) if part is not None]
        packed = [(part, start) for part, start in parts if isinstance(part, PackedFactors)]
        if packed and len(packed) == len(parts) and native.library() is not None:
            return cls(delta, native.SiteFactors(packed, transposed=site.kind == "embedding"))
        return cls(delta, None)


class CpuBackend(Backend):
    """See `Backend`. Slots hold references: nothing is copied."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        native.library()  # compiled at most once per machine, and then not while a request waits
        self._slots: list[dict[int, Prepared]] = [{} for _ in range(slots)]
        self._tokens, self._samples = Rows(), Rows()

    def reserve(self, tenants: Iterable[TenantDelta]) -> None:
        """Slots need nothing."""

    def prepare(self, delta: TenantDelta) -> dict[int, Prepared]:
        return {number: Prepared.of(self.sites[number], found) for number, found in delta.items()}

    def activate(self, slot: int, prepared: dict[int, Prepared]) -> None:
        self._slots[slot] = prepared

    def deactivate(self, slot: int) -> None:
        self._slots[slot] = {}

    def _set_rows(self, tokens: np.ndarray, samples: np.ndarray) -> None:
        self._tokens, self._samples = Rows.of(tokens), Rows.of(samples)

    def linear_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        self._add_linear(y, x, site, self._tokens)

    def logits_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        start = self.prompt_start(x)
        rows = self._samples if start is None else self._tokens.window(start, x.shape[0])
        self._add_linear(y, x, site, rows)

    def embedding_(self, y: torch.Tensor, ids: torch.Tensor, site: int) -> None:
        for slot, rows in self._tokens.groups:
            found = self._slots[slot].get(site)
            part = found.delta.parts[0] if found is not None else None
            if found is None or part is None:
                continue
            wanted = ids[rows]
            known = (wanted >= 0) & (wanted < part.rows.length)
            inside = wanted.clamp(0, part.rows.length - 1)
            if found.compiled is not None and isinstance(part, PackedFactors):
                values = native.expand(cpu.gather(inside, part), found.compiled, part.cols.length)
            else:
                values = cpu.embedding(inside, part)
            _add(y, rows, values * known[:, None])

    def norm_(self, y: torch.Tensor, x: torch.Tensor, site: int, eps: float) -> None:
        for slot, rows in self._tokens.groups:
            found = self._slots[slot].get(site)
            if found is not None and found.delta.weight is not None:
                y[rows] = _finite(cpu.rms_norm(x[rows].float(), found.delta.weight, eps), y.dtype)

    def _add_linear(self, y: torch.Tensor, x: torch.Tensor, site: int, batch: Rows) -> None:
        fast = []
        for slot, rows in batch.groups:
            found = self._slots[slot].get(site)
            if found is None:
                continue
            delta = found.delta
            if found.compiled is not None:
                fast.append((rows, delta, found.compiled))
                continue
            inputs, start = x[rows].float(), 0
            outputs = torch.zeros(rows.numel(), y.shape[1], dtype=torch.float32)
            for part, width in zip(delta.parts, self.sites[site].widths, strict=True):
                if part is not None:
                    outputs[:, start : start + width] = cpu.linear(inputs, part)
                start += width
            if delta.bias is not None:
                outputs += delta.bias
            _add(y, rows, outputs)
        if fast:
            together = torch.cat([rows for rows, _, _ in fast])
            groups = [(factors, rows.numel()) for rows, _, factors in fast]
            outputs = native.linear(x[together], groups, y.shape[1])
            for part, (_, delta, _) in zip(outputs.split([n for _, n in groups]), fast, strict=True):
                if delta.bias is not None:
                    part += delta.bias
            _add(y, together, outputs)


def _add(y: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    y[rows] = _finite(y[rows].float() + values, y.dtype)


def _finite(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` as ``dtype``, NaN as 0 and overflow as the largest number.

    A tenant whose numbers overflow must hurt itself alone. NaN in its KV blocks would outlive it: attention
    multiplies what a block's next owner has not yet filled by zero, and zero times NaN is NaN.
    """
    limit = torch.finfo(dtype).max
    return torch.nan_to_num(values, nan=0.0).clamp_(-limit, limit).to(dtype)
