"""What computes a layer's deltas on a CPU: our kernels and the ways beside them, from the same deltas."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.generate_delta import SHAPES
from benchmarks.layer import Case, Module, random_layer, sites, weights
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels import native

COPY_BYTES = 256 << 20
OTHERS_BYTES = 8 << 30  # dense contenders are left out where they would need more memory


class Layer:
    """One layer's deltas of a case's tenants at every site, in the forms that the contenders take."""

    def __init__(self, case: Case, dense: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = SHAPES[case.shape]
        self.tenants, self.tokens = case.tenants, case.tokens
        layers = [random_layer(shape, case.ratio, generator) for _ in range(case.tenants)]
        # [site][tenant][slice]
        self.modules: list[list[list[Module]]] = [list(site) for site in zip(*layers, strict=True)]
        self.packed_bytes = sum(m.payload.numel() for layer in layers for site in layer for m in site)
        self.inputs: list[torch.Tensor] = []
        self.columns: list[int] = []
        self.packed: list[list[tuple[native.SiteFactors, int]]] = []
        self.factors: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.dense: list[torch.Tensor] = []
        for (rows, cols), tenants in zip(sites(shape).values(), self.modules, strict=True):
            self.inputs.append(torch.randn(case.rows, cols, generator=generator).bfloat16())
            self.columns.append(sum(rows))
            starts = [sum(rows[:i]) for i in range(len(rows))]
            self.packed.append(
                [
                    (
                        native.SiteFactors([(m.packed(), at) for m, at in zip(slices, starts, strict=True)]),
                        case.tokens,
                    )
                    for slices in tenants
                ]
            )
            self.factors.append(
                [
                    (
                        torch.randn(case.tenants, cols, m.directions, generator=generator).bfloat16(),
                        torch.randn(case.tenants, m.directions, n, generator=generator).bfloat16(),
                    )
                    for n, m in zip(rows, tenants[0], strict=True)
                ]
            )
            if dense:
                self.dense.append(
                    torch.stack([torch.cat([m.quantized().dense() for m in t]).bfloat16() for t in tenants])
                )

    def ours(self) -> None:
        for x, groups, columns in zip(self.inputs, self.packed, self.columns, strict=True):
            native.linear(x, groups, columns)

    def dense_product(self) -> None:
        for x, weight in zip(self.inputs, self.dense, strict=True):
            torch.bmm(x.view(self.tenants, self.tokens, -1), weight.transpose(1, 2))

    def dequantized(self) -> None:
        for x, site in zip(self.inputs, self.modules, strict=True):
            for rows, slices in zip(x.float().split(self.tokens), site, strict=True):
                for module in slices:
                    rows @ module.quantized().dense().T

    def lora(self) -> None:
        for x, parts in zip(self.inputs, self.factors, strict=True):
            for v, u in parts:
                torch.bmm(torch.bmm(x.view(self.tenants, self.tokens, -1), v), u)


class Bench:
    """Measures cases, one after the other."""

    def __init__(self, threads: int) -> None:
        if native.library() is None:
            raise PrinMixError("the CPU kernels cannot be compiled here", fix="install g++, or set CXX")
        if threads:
            torch.set_num_threads(threads)
        self.copy_bytes_per_second = copy_bandwidth()

    def measure(self, case: Case) -> dict[str, Any]:
        """``packed_bytes`` and ``seconds`` of every contender for one layer."""
        dense = 2 * weights(SHAPES[case.shape]) * case.tenants <= OTHERS_BYTES
        layer = Layer(case, dense)
        repeats = 20 if case.rows <= 64 else 5
        found = {"ours": seconds(layer.ours, repeats), "lora": seconds(layer.lora, repeats)}
        failed = {}
        if dense:
            found["dense"] = seconds(layer.dense_product, repeats)
        else:
            failed["dense"] = f"needs more than {OTHERS_BYTES >> 30} GiB"
        found["dequantize"] = seconds(layer.dequantized, 1)
        return {"packed_bytes": layer.packed_bytes, "seconds": found, "failed": failed}


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a plain copy reads."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return COPY_BYTES / seconds(lambda: target.copy_(source), 5)
