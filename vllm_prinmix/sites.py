"""The model's sites: found, wrapped so that deltas are added inside each module, and matched with deltas.

A module's ``quant_method`` is replaced by one that first runs the base's and then our op: inside the layer,
before any collective, so tensor parallelism is plain slicing; and quantized bases work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_prinmix import ops
from vllm_prinmix.compat import resolve
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.delta import Delta
from vllm_prinmix.format.schema import Exact, Factors, Module
from vllm_prinmix.kernels.packed import Packed, PackedFactors, PackedMatrix


@dataclass(frozen=True)
class Site:
    """A wrapped module. ``parts`` are the checkpoint's names (less .weight) of the slices of its output."""

    number: int
    module: Any  # nn.Module; attributes differ by layer type
    kind: str  # linear, embedding, norm
    parts: tuple[str, ...]
    head: bool = False
    tied: bool = False  # a head whose weight is the embedding's


def attach(model: nn.Module, slots: int, tied: bool) -> list[Site]:
    """Wrap every linear, embedding, head and norm of ``model``, in the model's own order."""
    ops.reset()
    packed = dict(getattr(model, "packed_modules_mapping", None) or {})
    sites: list[Site] = []
    module: Any
    for name, module in model.named_modules():
        prefix, _, leaf = name.rpartition(".")
        parts = tuple(f"{prefix}.{part}" if prefix else part for part in packed.get(leaf, [leaf]))
        number = len(ops.sites)
        is_head = leaf == "lm_head"
        if isinstance(module, resolve("LinearBase")):
            widths = tuple(getattr(module, "output_partition_sizes", None) or [module.output_size])
            if len(widths) != len(parts):
                raise _unknown_layer(name, f"{len(widths)} slices for {len(parts)} checkpoint tensors")
            _wrap(module, number, head=is_head)
            sites.append(Site(number, module, "linear", parts))
        elif isinstance(module, resolve("VocabParallelEmbedding")):
            module.use_fused_embedding = False  # a CUDA path that would go past quant_method
            widths = (module.num_embeddings_per_partition,)
            _wrap(module, number, head=is_head)
            sites.append(Site(number, module, "embedding", parts, head=is_head, tied=is_head and tied))
        elif isinstance(module, resolve("RMSNorm")):
            widths = (0,)
            _wrap_norm(module, number)
            sites.append(Site(number, module, "norm", parts))
        else:
            continue
        ops.sites.append(ops.Site(widths, [None] * slots))
    return sites


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
            if ops.step.tokens.groups:
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


def load_sites(delta: Delta, sites: list[Site], device: torch.device) -> dict[int, ops.SiteDelta]:
    """A delta cut to this rank: site number -> what to add there.

    Raises PrinMixError where a module of the delta fits no site: it would otherwise silently not be served.
    """
    unused = set(delta.config.modules)
    loaded: dict[int, ops.SiteDelta] = {}
    for site in sites:
        names = ("model.embed_tokens",) if site.tied else site.parts
        weights = [_take(delta, f"{part}.weight", unused) for part in names]
        biases = [_take(delta, f"{part}.bias", unused) for part in names]
        if all(tensor is None for _, tensor in weights + biases):
            continue
        found = ops.SiteDelta()
        for i, (spec, tensor) in enumerate(weights):
            if spec is None:
                found.parts.append(None)
            elif isinstance(spec, Exact) and site.kind == "norm":
                _check_shape(delta, site.parts[i], tensor, tuple(site.module.weight.shape))
                found.weight = tensor.to(device=device, dtype=torch.float32)
            elif isinstance(spec, Exact) or site.kind == "norm":
                raise _mismatch(delta, site.parts[i], f"kind {spec.kind}", f"the kind for a {site.kind}")
            else:
                found.parts.append(_cut(delta, site, i, spec, tensor).to(device))
        for part, (spec, _) in zip(names, biases, strict=True):
            if spec is not None and not (isinstance(spec, Exact) and site.kind == "linear"):
                raise _mismatch(delta, f"{part}.bias", f"kind {spec.kind}", "no bias, or one of kind exact")
        if any(tensor is not None for _, tensor in biases):
            found.bias = _bias(delta, site, [tensor for _, tensor in biases], device)
        if site.kind != "norm":
            found.prepare(
                ops.sites[site.number].widths, transposed=site.kind == "embedding" and not site.head
            )
        loaded[site.number] = found
    if unused:
        names_left = sorted(unused)
        raise PrinMixError(
            "the delta has modules that the served model lacks",
            where=delta.folder,
            found=", ".join(names_left[:5])
            + (f" and {len(names_left) - 5} more" if len(names_left) > 5 else ""),
            fix="serve the base that the delta was made from",
        )
    return loaded


def _take(delta: Delta, name: str, unused: set[str]) -> tuple[Module | None, Any]:
    spec = delta.config.modules.get(name)
    unused.discard(name)
    return spec, delta.tensors.get(name)


def _cut(delta: Delta, site: Site, part: int, spec: Any, payload: torch.Tensor) -> Packed:
    """This rank's slice of one packed matrix."""
    rows, cols = spec.shape
    packed: Packed
    if isinstance(spec, Factors):
        classes = [(c.v_bits, c.u_bits, c.directions) for c in spec.classes]
        packed = PackedFactors.from_payload(payload, spec.shape, classes, spec.row_scale)
    else:
        packed = PackedMatrix.from_payload(payload, spec.shape, spec.bits)
    module = site.module
    if site.kind == "embedding":
        shard = module.shard_indices
        start, stop = shard.org_vocab_start_index, min(shard.org_vocab_end_index, rows)
        _check_shape(
            delta, site.parts[part], None, (module.org_vocab_size, module.embedding_dim), (rows, cols)
        )
        return packed if (start, stop) == (0, rows) else packed.slice_rows(start, stop)
    start, stop = _output_range(site, part, rows)
    first, last = _input_range(site, cols)
    expected = (module.output_partition_sizes[part], module.input_size_per_partition)
    _check_shape(delta, site.parts[part], None, expected, (stop - start, last - first))
    if (start, stop) != (0, rows):
        packed = packed.slice_rows(start, stop)
    return packed if (first, last) == (0, cols) else packed.slice_cols(first, last)


def _output_range(site: Site, part: int, rows: int) -> tuple[int, int]:
    """Rows of the whole matrix that this rank computes."""
    module = site.module
    rank, size = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)
    if size == 1 or isinstance(module, (resolve("RowParallelLinear"), resolve("ReplicatedLinear"))):
        return 0, rows
    if isinstance(module, resolve("QKVParallelLinear")) and part > 0:
        rank, size = rank // module.num_kv_head_replicas, size // module.num_kv_head_replicas
    return rank * rows // size, (rank + 1) * rows // size


def _input_range(site: Site, cols: int) -> tuple[int, int]:
    """Columns of the whole matrix that this rank computes."""
    module = site.module
    if not isinstance(module, resolve("RowParallelLinear")):
        return 0, cols
    return module.tp_rank * cols // module.tp_size, (module.tp_rank + 1) * cols // module.tp_size


def _bias(
    delta: Delta, site: Site, tensors: list[torch.Tensor | None], device: torch.device
) -> torch.Tensor | None:
    """Fine-tuned bias less the base's, float32 [output rows of this rank]."""
    module = site.module
    if isinstance(module, resolve("RowParallelLinear")) and module.tp_rank > 0:
        return None  # the bias is added once, on the first rank
    base = module.bias
    total = torch.zeros(sum(ops.sites[site.number].widths), dtype=torch.float32)
    start = 0
    for i, (tensor, width) in enumerate(zip(tensors, ops.sites[site.number].widths, strict=True)):
        if tensor is not None:
            first, last = _output_range(site, i, tensor.shape[0])
            _check_shape(delta, site.parts[i], None, (width,), (last - first,))
            total[start : start + width] = tensor[first:last].float()
            if base is not None:
                total[start : start + width] -= base[start : start + width].float().cpu()
        start += width
    return total.to(device)


def _check_shape(
    delta: Delta, name: str, tensor: torch.Tensor | None, expected: tuple, found: tuple | None = None
) -> None:
    found = tuple(tensor.shape) if found is None and tensor is not None else found
    if found != expected:
        raise _mismatch(delta, name, f"shape {found}", f"shape {expected}")


def _mismatch(delta: Delta, name: str, found: str, expected: str) -> PrinMixError:
    return PrinMixError(
        "a module of the delta does not fit the served model",
        where=f"{delta.folder}: {name}",
        found=found,
        expected=expected,
        fix="serve the base that the delta was made from",
    )


def _unknown_layer(name: str, found: str) -> PrinMixError:
    return PrinMixError(
        "a layer of the served model is unknown to PrinMix", where=name, found=found, fix="report it"
    )
