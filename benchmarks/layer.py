"""The deltas of one decoder layer, from which every contender of `benchmarks.kernels` takes its own form."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from benchmarks.generate_delta import Shape, directions, random_payload
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import Factors
from vllm_prinmix.kernels.packed import PackedFactors
from vllm_prinmix.kernels.quantized import QuantizedFactors


@dataclass(frozen=True)
class Case:
    """A batch: ``tokens`` rows of each of ``tenants`` tenants; deltas of ``ratio`` to a base of ``shape``."""

    shape: str
    tenants: int
    tokens: int
    ratio: Fraction

    @property
    def rows(self) -> int:
        return self.tenants * self.tokens


@dataclass(frozen=True)
class Module:
    """One module's delta, as it is on disk. ``payload`` is uint8."""

    spec: Factors
    payload: torch.Tensor

    def packed(self) -> PackedFactors:
        classes = [(c.v_bits, c.u_bits, c.directions) for c in self.spec.classes]
        return PackedFactors.from_payload(self.payload, self.spec.shape, classes, self.spec.row_scale)

    def quantized(self) -> QuantizedFactors:
        found = decode(self.spec, self.payload)
        assert isinstance(found, QuantizedFactors)
        return found

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(V [directions, cols], U [directions, rows]) with dW ~= U^T V; the scale is in V."""
        packed = self.quantized()
        v = packed.v_codes.to(dtype).sub_(packed.v_zero.to(dtype)[:, None])
        u = packed.u_codes.to(dtype).sub_(packed.u_zero.to(dtype)[:, None])
        return v.mul_(packed.scale.to(dtype)[:, None]), u

    @property
    def directions(self) -> int:
        return sum(c.directions for c in self.spec.classes)


def sites(shape: Shape) -> dict[str, tuple[list[int], int]]:
    """name -> (rows of each slice, columns) of a decoder layer's linear layers."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    return {
        "qkv": ([hidden, kv, kv], hidden),
        "o": ([hidden], hidden),
        "gate_up": ([inner, inner], hidden),
        "down": ([hidden], inner),
    }


def weights(shape: Shape) -> int:
    """Numbers in a layer's linear layers."""
    return sum(sum(rows) * cols for rows, cols in sites(shape).values())


def random_layer(
    shape: Shape, ratio: Fraction, generator: torch.Generator, device: torch.device | str = "cpu"
) -> list[list[Module]]:
    """One tenant's deltas: for each site, a module for each slice."""
    layer = []
    for rows, cols in sites(shape).values():
        specs = [Factors(shape=(n, cols), classes=directions(n, cols, ratio)) for n in rows]
        layer.append([Module(spec, random_payload(spec, generator).to(device)) for spec in specs])
    return layer
