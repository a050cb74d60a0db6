"""What computes a layer's deltas on a GPU: our Triton kernels and the ways beside them, from the same deltas.

Each contender adds a layer's deltas to what the base computed, `Batch.outputs`. It keeps several copies of
what it reads; `add(copy)` works on one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch

from benchmarks.generate_delta import SHAPES
from benchmarks.layer import Case, Module, random_layer, sites
from vllm_prinmix.kernels import segmented
from vllm_prinmix.kernels.descriptors import Arena, Part, SiteTables, columns, groups, site_table, whole_tiles
from vllm_prinmix.kernels.packed import PackedFactors
from vllm_prinmix.kernels.packing import align
from vllm_prinmix.kernels.segments import Segments

RANK_STEP = 64  # vLLM's maximum rank is one of a few round numbers
DISTINCT = 2  # tenants with numbers of their own; those after them repeat these, at places of their own


class Batch:
    """The rows of a case and the deltas of its tenants. ``modules``: [distinct tenant][site][slice]."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        distinct: int = DISTINCT,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = SHAPES[case.shape]
        self.case, self.device, self.dtype = case, device, dtype
        self.sites = list(sites(shape).values())
        self.modules = [
            random_layer(shape, case.ratio, generator, device) for _ in range(min(case.tenants, distinct))
        ]
        self.inputs, self.outputs = [], []
        for rows, cols in self.sites:
            self.inputs.append(torch.randn(case.rows, cols, device=device).to(dtype))
            self.outputs.append(torch.zeros(case.rows, sum(rows), dtype=dtype, device=device))
        each = sum(m.payload.numel() for site in self.modules[0] for m in site)
        self.packed_bytes = each * case.tenants

    def tenant(self, number: int) -> list[list[Module]]:
        """[site][slice]"""
        return self.modules[number % len(self.modules)]

    def by_tenant(self, rows: torch.Tensor) -> torch.Tensor:
        """[tenants * tokens, n] as [tenants, tokens, n]"""
        return rows.view(self.case.tenants, self.case.tokens, -1)


class Contender(ABC):
    """One way to compute a batch's deltas."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def nbytes(batch: Batch) -> int:
        """What one copy takes on the device."""

    @abstractmethod
    def __init__(self, batch: Batch, copies: int) -> None: ...

    @abstractmethod
    def add(self, copy: int) -> None:
        """Add the deltas, reading one of the copies."""

    def note(self) -> str | None:
        """What the result should say about it."""
        return None


class Ours(Contender):
    """The packed deltas in slots, as the server keeps them."""

    name = "ours"
    max_tenants = 64  # of the server: kernels are compiled for it, not for the tenants in a batch

    @staticmethod
    def nbytes(batch: Batch) -> int:
        return batch.case.tenants * max(sum(_parts_bytes(site) for site in t) for t in _parts(batch))

    def __init__(self, batch: Batch, copies: int) -> None:
        case, device, dtype = batch.case, batch.device, batch.dtype
        self.batch = batch
        self.asm = device.type == "cuda" and torch.version.hip is None
        self.programs = segmented.programs_for(device) if device.type == "cuda" else 3
        tenants = _parts(batch)
        self.arena = Arena(torch.zeros(copies * self.nbytes(batch), dtype=torch.uint8, device=device))
        self.tables: list[list[SiteTables]] = []
        end = 0
        for _ in range(copies):
            tables = [SiteTables(rows, cols, case.tenants, device) for rows, cols in batch.sites]
            for slot in range(case.tenants):
                for table, parts in zip(tables, tenants[slot % len(tenants)], strict=True):
                    end = table.put(slot, parts, self.arena, end)
            self.tables.append(tables)
        self.segments = Segments(max(self.max_tenants, case.tenants), case.rows, device)
        self.segments.set(np.repeat(np.arange(case.tenants), case.tokens))
        widest, most = (
            max(sum(of(part.delta) for part in site) for tenant in tenants for site in tenant)
            for of in (columns, groups)
        )
        cols = max(table.col_blocks for table in self.tables[0]) * 128
        self.workspace = segmented.Workspace(case.rows, cols, widest, most, dtype, device)

    def add(self, copy: int) -> None:
        for y, x, table in zip(self.batch.outputs, self.batch.inputs, self.tables[copy], strict=True):
            segmented.linear_(
                y, x, table, self.arena, self.segments, self.workspace, self.programs, asm=self.asm
            )


def _parts(batch: Batch) -> list[list[list[Part]]]:
    """[distinct tenant][site][slice]"""
    return [[[Part(whole_tiles(m.packed())) for m in site] for site in tenant] for tenant in batch.modules]


def _parts_bytes(parts: list[Part]) -> int:
    """What `SiteTables.put` takes."""
    deltas = [part.delta for part in parts if isinstance(part.delta, PackedFactors)]
    return sum(align(t.nbytes) for delta in deltas for t in delta.tensors()) + align(
        site_table(parts, [0] * len(parts), lambda t: 0).nbytes
    )


class Dense(Contender):
    """A batched product with dW in bfloat16."""

    name = "dense"

    @staticmethod
    def nbytes(batch: Batch) -> int:
        return 2 * batch.case.tenants * sum(sum(rows) * cols for rows, cols in batch.sites)

    def __init__(self, batch: Batch, copies: int) -> None:
        self.batch = batch
        self.weights: list[list[torch.Tensor]] = []  # [copy][site]: [tenants, cols, rows]
        for _ in range(copies):
            self.weights.append([])
            for site, (rows, cols) in enumerate(batch.sites):
                size = batch.case.tenants, sum(rows), cols
                weight = torch.empty(size, dtype=batch.dtype, device=batch.device)
                own = [_dense(tenant[site], batch.dtype) for tenant in batch.modules]
                for number in range(batch.case.tenants):
                    weight[number] = own[number % len(own)]
                self.weights[-1].append(weight.transpose(1, 2))

    def add(self, copy: int) -> None:
        for y, x, weight in zip(self.batch.outputs, self.batch.inputs, self.weights[copy], strict=True):
            self.batch.by_tenant(y).baddbmm_(self.batch.by_tenant(x), weight)


def _dense(modules: list[Module], dtype: torch.dtype) -> torch.Tensor:
    """[rows of all slices, cols]"""
    return torch.cat([u.T @ v for v, u in (m.factors(dtype) for m in modules)])


class Dequantize(Contender):
    """dW made from the packed bytes by torch's own operations, then a product with it; tenant by tenant."""

    name = "dequantize"

    @staticmethod
    def nbytes(batch: Batch) -> int:
        return batch.packed_bytes

    def __init__(self, batch: Batch, copies: int) -> None:
        self.batch = batch
        self.tenants = [
            [
                [[Module(m.spec, m.payload.clone()) for m in site] for site in batch.tenant(number)]
                for number in range(batch.case.tenants)
            ]
            for _ in range(copies)
        ]

    def add(self, copy: int) -> None:
        for site, (y, x) in enumerate(zip(self.batch.outputs, self.batch.inputs, strict=True)):
            rows = zip(self.batch.by_tenant(y), self.batch.by_tenant(x), self.tenants[copy], strict=True)
            for y_tenant, x_tenant, modules in rows:
                y_tenant.addmm_(x_tenant, _dense(modules[site], self.batch.dtype).T)


class Lora(Contender):
    """vLLM's LoRA kernels, with bfloat16 factors of as many directions as the deltas have."""

    name = "lora"

    @staticmethod
    def ranks(batch: Batch) -> list[int]:
        """Of each site: one for all slices, as the kernels want it."""
        most = [
            max(m.directions for tenant in batch.modules for m in tenant[i]) for i in range(len(batch.sites))
        ]
        return [-(-rank // RANK_STEP) * RANK_STEP for rank in most]

    @staticmethod
    def nbytes(batch: Batch) -> int:
        per_tenant = sum(
            rank * (cols * len(rows) + sum(rows))
            for rank, (rows, cols) in zip(Lora.ranks(batch), batch.sites, strict=True)
        )
        return 2 * batch.case.tenants * per_tenant

    def __init__(self, batch: Batch, copies: int) -> None:
        # Here, since most machines with the rest of what this benchmark needs have no vLLM.
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
        from vllm.lora.ops.triton_ops import utils as lora_utils

        # They remember strides by address, and addresses come again when another case has ended.
        lora_utils._LORA_A_PTR_DICT.clear()
        lora_utils._LORA_B_PTR_DICT.clear()
        self.batch, self.shrink, self.expand = batch, lora_shrink, lora_expand
        case, device = batch.case, batch.device
        meta = LoRAKernelMeta.make(case.tenants, case.rows, device)
        mapping = torch.arange(case.tenants, dtype=torch.int32, device=device)
        meta.prepare_tensors(mapping.repeat_interleave(case.tokens))
        self.arguments = meta.meta_args(case.rows, specialize_active_lora=True)
        # [copy][site]: for each slice A [tenants, rank, cols], and B [tenants, rows, rank]
        self.factors = [[self._padded(site) for site in range(len(batch.sites))] for _ in range(copies)]
        self.between = [
            torch.zeros(len(rows), case.rows, rank, dtype=torch.float32, device=device)
            for rank, (rows, _) in zip(self.ranks(batch), batch.sites, strict=True)
        ]

    def _padded(self, site: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        batch, rank = self.batch, self.ranks(self.batch)[site]
        rows, cols = batch.sites[site]
        a = [
            torch.zeros(batch.case.tenants, rank, cols, dtype=batch.dtype, device=batch.device) for _ in rows
        ]
        b = [torch.zeros(batch.case.tenants, n, rank, dtype=batch.dtype, device=batch.device) for n in rows]
        own = [[m.factors(batch.dtype) for m in tenant[site]] for tenant in batch.modules]
        for number in range(batch.case.tenants):
            for part, (v, u) in enumerate(own[number % len(own)]):
                a[part][number, : len(v)] = v
                b[part][number, :, : len(u)] = u.T
        return a, b

    def add(self, copy: int) -> None:
        together = zip(self.batch.outputs, self.batch.inputs, self.between, self.factors[copy], strict=True)
        for y, x, t, (a, b) in together:
            self.shrink(x, a, t, *self.arguments, 1.0)
            self.expand(t, b, y, *self.arguments, 0, True)

    def note(self) -> str:
        return f"ranks {', '.join(map(str, self.ranks(self.batch)))}"


class Base(Contender):
    """The base model's own products, for all rows at once; they set the outputs."""

    name = "base"

    @staticmethod
    def nbytes(batch: Batch) -> int:
        return 2 * sum(sum(rows) * cols for rows, cols in batch.sites)

    def __init__(self, batch: Batch, copies: int) -> None:
        self.batch = batch
        self.weights = [
            [
                torch.randn(sum(rows), cols, device=batch.device).mul_(cols**-0.5).to(batch.dtype)
                for rows, cols in batch.sites
            ]
            for _ in range(copies)
        ]

    def add(self, copy: int) -> None:
        for y, x, weight in zip(self.batch.outputs, self.batch.inputs, self.weights[copy], strict=True):
            torch.mm(x, weight.T, out=y)


CONTENDERS: tuple[type[Contender], ...] = (Ours, Dense, Lora, Dequantize)
