"""Deltas added on the CPU: by the compiled kernels where these can do it, by torch's operators elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vllm_prinmix.backend import Backend, Site, SiteDelta, TenantDelta
from vllm_prinmix.kernels import cpu, native
from vllm_prinmix.kernels.packed import PackedFactors


@dataclass
class Prepared:
    """A site's delta, and what the compiled kernels take of it, where they can do all of it."""

    delta: SiteDelta
    compiled: native.SiteFactors | None = None
    weight: torch.Tensor | None = None  # of a norm

    @property
    def address(self) -> int | None:
        if self.weight is not None:
            return self.weight.data_ptr()
        return self.compiled.address if self.compiled is not None else None

    @classmethod
    def of(cls, site: Site, delta: SiteDelta) -> Prepared:
        if native.library() is None:
            return cls(delta)
        if delta.weight is not None:
            return cls(delta, weight=delta.weight.float().contiguous())
        starts = itertools.accumulate(site.widths, initial=0)
        parts: list[tuple[PackedFactors | int, int]] = []
        for part, width, start in zip(delta.parts, site.widths, starts, strict=False):
            if not (part is None or isinstance(part, PackedFactors)):
                return cls(delta)
            parts.append((width if part is None else part, start))
        if all(isinstance(part, int) for part, _ in parts):
            return cls(delta)
        return cls(delta, native.SiteFactors(parts, delta.bias, transposed=site.kind == "embedding"))


class CpuBackend(Backend):
    """See `Backend`. Slots hold references: nothing is copied."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        native.library()  # compiled at most once per machine, and then not while a request waits
        self._slots: list[dict[int, Prepared]] = [{} for _ in range(slots)]
        # For each site, what the kernels take, and the slots whose deltas torch's operators have to add.
        self._tables: list[native.Table] = []
        self._others: list[set[int]] = []
        self._tokens, self._samples = native.Rows(), native.Rows()

    def add_site(self, site: Site) -> int:
        self._tables.append(native.Table(self.slots))
        self._others.append(set())
        return super().add_site(site)

    def reserve(self, tenants: Iterable[TenantDelta]) -> None:
        """Slots need nothing."""

    def warm_up(self) -> None:
        """Everything is compiled already."""

    def prepare(self, delta: TenantDelta) -> dict[int, Prepared]:
        return {number: Prepared.of(self.sites[number], found) for number, found in delta.items()}

    def activate(self, slot: int, prepared: dict[int, Prepared]) -> None:
        self.deactivate(slot)
        self._slots[slot] = prepared
        for site, found in prepared.items():
            self._tables[site][slot] = found.address
            if found.address is None:
                self._others[site].add(slot)

    def deactivate(self, slot: int) -> None:
        for site in self._slots[slot]:
            self._tables[site][slot] = None
            self._others[site].discard(slot)
        self._slots[slot] = {}

    def _set_rows(self, tokens: np.ndarray, samples: np.ndarray) -> None:
        self._tokens, self._samples = native.Rows.of(tokens), native.Rows.of(samples)

    def linear_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        self._add_linear(y, x, site, self._tokens)

    def logits_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        start = self.prompt_start(x)
        rows = self._samples if start is None else self._tokens.window(start, x.shape[0])
        self._add_linear(y, x, site, rows)

    def embedding_(self, y: torch.Tensor, ids: torch.Tensor, site: int) -> None:
        for slot, numbers in self._tokens.groups:
            found = self._slots[slot].get(site)
            part = found.delta.parts[0] if found is not None else None
            if found is None or part is None:
                continue
            rows = torch.from_numpy(numbers)
            wanted = ids[rows]
            known = ((wanted >= 0) & (wanted < part.rows.length))[:, None]
            inside = wanted.clamp(0, part.rows.length - 1)
            if found.compiled is not None and isinstance(part, PackedFactors):
                native.expand_(y, cpu.gather(inside, part) * known, found.compiled, rows)
            else:
                _add(y, rows, cpu.embedding(inside, part) * known)

    def norm_(self, y: torch.Tensor, x: torch.Tensor, site: int, eps: float) -> None:
        if native.library() is not None:
            native.norm_(y, x, self._tables[site], self._tokens, eps)
        for rows, delta in self._by_torch(site, self._tokens):
            if delta.weight is not None:
                y[rows] = _finite(cpu.rms_norm(x[rows].float(), delta.weight, eps), y.dtype)

    def _add_linear(self, y: torch.Tensor, x: torch.Tensor, site: int, batch: native.Rows) -> None:
        if native.library() is not None:
            native.linear_(y, x, self._tables[site], batch)
        for rows, delta in self._by_torch(site, batch):
            inputs, start = x[rows].float(), 0
            outputs = torch.zeros(rows.numel(), y.shape[1], dtype=torch.float32)
            for part, width in zip(delta.parts, self.sites[site].widths, strict=True):
                if part is not None:
                    outputs[:, start : start + width] = cpu.linear(inputs, part)
                start += width
            if delta.bias is not None:
                outputs += delta.bias
            _add(y, rows, outputs)

    def _by_torch(self, site: int, batch: native.Rows) -> Iterator[tuple[torch.Tensor, SiteDelta]]:
        """(rows, delta) of what the compiled kernels leave out at a site."""
        others = self._others[site]
        for slot, rows in batch.groups if others else ():
            if slot in others:
                yield torch.from_numpy(rows), self._slots[slot][site].delta


def _add(y: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    y[rows] = _finite(y[rows].float() + values, y.dtype)


def _finite(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` as ``dtype``, NaN as 0 and overflow as the largest number.

    A tenant whose numbers overflow must hurt itself alone. NaN in its KV blocks would outlive it: attention
    multiplies what a block's next owner has not yet filled by zero, and zero times NaN is NaN.
    """
    limit = torch.finfo(dtype).max
    return torch.nan_to_num(values, nan=0.0).clamp_(-limit, limit).to(dtype)
