"""The model's sites: found, and wrapped so that deltas are added inside each module.

A module's ``quant_method`` is replaced by one that first runs the base's and then our op: inside the layer,
before any collective, so tensor parallelism is plain slicing; and quantized bases work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_prinmix import ops
from vllm_prinmix.backend import Backend, Site
from vllm_prinmix.compat import resolve
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import BLOCK


@dataclass(frozen=True)
class SiteModule:
    """A wrapped module. ``parts`` are the checkpoint's names (less .weight) of the slices of its output."""

    number: int
    module: Any  # nn.Module; attributes differ by layer type
    kind: str  # linear, embedding, norm
    parts: tuple[str, ...]
    tied: bool = False  # a head whose weight is the embedding's


def attach(model: nn.Module, backend: Backend, tied: bool) -> list[SiteModule]:
    """Wrap every linear, embedding, head and norm of ``model``, in the model's own order."""
    packed = dict(getattr(model, "packed_modules_mapping", None) or {})
    modules: list[SiteModule] = []
    module: Any
    for name, module in model.named_modules():
        prefix, _, leaf = name.rpartition(".")
        parts = tuple(f"{prefix}.{part}" if prefix else part for part in packed.get(leaf, [leaf]))
        is_head = leaf == "lm_head"
        if isinstance(module, resolve("LinearBase")):
            widths = output_widths(module)
            if len(widths) != len(parts):
                raise _unknown_layer(name, f"{len(widths)} slices for {len(parts)} checkpoint tensors")
            starts = [output_start(module, i, width) for i, width in enumerate(widths)]
            cols, first = input_width(module), input_start(module)
            site = Site("linear", widths, cols, tuple(s % BLOCK for s in starts), first % BLOCK)
            number = backend.add_site(site)
            _wrap(module, number, head=is_head)
            modules.append(SiteModule(number, module, "linear", parts))
        elif isinstance(module, resolve("VocabParallelEmbedding")):
            module.use_fused_embedding = False  # a CUDA path that would go past quant_method
            start, stop = vocabulary(module)
            kind: Any = "linear" if is_head else "embedding"
            site = Site(kind, (stop - start,), module.embedding_dim, (start % BLOCK,), head=is_head)
            number = backend.add_site(site)
            _wrap(module, number, head=is_head)
            modules.append(SiteModule(number, module, kind, parts, tied=is_head and tied))
        elif isinstance(module, resolve("RMSNorm")):
            number = backend.add_site(Site("norm", (module.weight.numel(),)))
            _wrap_norm(module, number)
            modules.append(SiteModule(number, module, "norm", parts))
    return modules


def output_widths(linear: Any) -> tuple[int, ...]:
    """Rows of each slice of a linear layer's output on this rank."""
    return tuple(getattr(linear, "output_partition_sizes", None) or [linear.output_size])


def output_start(linear: Any, part: int, width: int) -> int:
    """First row of the whole matrix that this rank computes, of ``width`` in all."""
    rank, size = getattr(linear, "tp_rank", 0), getattr(linear, "tp_size", 1)
    if size == 1 or isinstance(linear, (resolve("RowParallelLinear"), resolve("ReplicatedLinear"))):
        return 0
    if isinstance(linear, resolve("QKVParallelLinear")) and part > 0:
        rank //= linear.num_kv_head_replicas
    return rank * width


def input_width(linear: Any) -> int:
    """Columns of a linear layer's weight on this rank."""
    return getattr(linear, "input_size_per_partition", linear.input_size)


def input_start(linear: Any) -> int:
    """First column of the whole matrix that this rank computes."""
    parallel = isinstance(linear, resolve("RowParallelLinear"))
    return linear.tp_rank * linear.input_size_per_partition if parallel else 0


def vocabulary(module: Any) -> tuple[int, int]:
    """Rows of an embedding or a head that this rank holds, without padding: (first, end)."""
    shard = module.shard_indices
    return shard.org_vocab_start_index, min(shard.org_vocab_end_index, module.org_vocab_size)


class DeltaMethod:
    """Mixed into a class derived from the base's quant_method class, which vLLM checks with isinstance."""

    _prinmix_base: Any
    _prinmix_site: int
    _prinmix_head: bool

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self._prinmix_base.apply(layer, x, bias)
        op = torch.ops.prinmix.linear_
        if self._prinmix_head:
            op = torch.ops.prinmix.logits_
            if ops.active():
                # The sampler's dtype: logits are large, and rounding them to bfloat16 twice would show.
                y = y.float()
        op(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self._prinmix_site)
        return y

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        y = self._prinmix_base.embedding(layer, ids)
        torch.ops.prinmix.embedding_(y.view(-1, y.shape[-1]), ids.reshape(-1), self._prinmix_site)
        return y


def _wrap(module: Any, number: int, head: bool) -> None:
    base = module.quant_method
    method = type(f"PrinMix{type(base).__name__}", (DeltaMethod, type(base)), {})
    proxy: Any = object.__new__(method)
    vars(proxy).update(vars(base), _prinmix_base=base, _prinmix_site=number, _prinmix_head=head)
    module.quant_method = proxy


def _wrap_norm(norm: Any, number: int) -> None:
    base = norm._forward_method

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        # What is normalised is x, which the base op leaves as it is, or x + residual, its second output.
        if residual is None:
            y = base(x)
            torch.ops.prinmix.norm_(y, x, number, norm.variance_epsilon)
            return y
        y, summed = base(x, residual)
        torch.ops.prinmix.norm_(y, summed, number, norm.variance_epsilon)
        return y, summed

    norm._forward_method = forward


def _unknown_layer(name: str, found: str) -> PrinMixError:
    return PrinMixError(
        "a layer of the served model is unknown to PrinMix", where=name, found=found, fix="report it"
    )
