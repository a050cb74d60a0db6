"""From a delta's files to what each site of this rank adds: matched by name, checked, cut to the rank."""

from __future__ import annotations

from typing import Any

import torch

from vllm_prinmix.backend import SiteDelta, TenantDelta
from vllm_prinmix.compat import resolve
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.delta import Delta
from vllm_prinmix.format.schema import Exact, Factors, Module
from vllm_prinmix.kernels.packed import Packed, PackedFactors, PackedMatrix
from vllm_prinmix.sites import SiteModule, input_start, input_width, output_start, output_widths, vocabulary


def cut_to_rank(delta: Delta, modules: list[SiteModule]) -> TenantDelta:
    """A delta cut to this rank; views into its tensors where nothing is cut.

    Raises PrinMixError where a module of the delta fits no site: it would otherwise silently not be served.
    """
    unused = set(delta.config.modules)
    loaded: TenantDelta = {}
    cuts: dict[str, Packed] = {}
    for site in modules:
        names = ("model.embed_tokens",) if site.tied else site.parts
        weights = [_take(delta, f"{part}.weight", unused) for part in names]
        biases = [_take(delta, f"{part}.bias", unused) for part in names]
        if all(tensor is None for _, tensor in weights + biases):
            continue
        found = SiteDelta()
        for i, (spec, tensor) in enumerate(weights):
            if spec is None:
                found.parts.append(None)
            elif isinstance(spec, Exact) and site.kind == "norm":
                _check_shape(delta, site.parts[i], tuple(site.module.weight.shape), tuple(tensor.shape))
                found.weight = tensor.float()
            elif isinstance(spec, Exact) or site.kind == "norm":
                raise _mismatch(delta, site.parts[i], f"kind {spec.kind}", f"the kind for a {site.kind}")
            else:
                # A tied head has the embedding's part: in memory once.
                cuts[names[i]] = cuts.get(names[i]) or _cut(delta, site, i, spec, tensor)
                found.parts.append(cuts[names[i]])
        linear = isinstance(site.module, resolve("LinearBase"))
        for part, (spec, _) in zip(names, biases, strict=True):
            if spec is not None and not (isinstance(spec, Exact) and linear):
                raise _mismatch(delta, f"{part}.bias", f"kind {spec.kind}", "no bias, or one of kind exact")
        if any(tensor is not None for _, tensor in biases):
            found.bias = _bias(delta, site, [tensor for _, tensor in biases])
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


def _cut(delta: Delta, site: SiteModule, part: int, spec: Any, payload: torch.Tensor) -> Packed:
    """This rank's slice of one packed matrix."""
    rows, cols = spec.shape
    packed: Packed
    if isinstance(spec, Factors):
        classes = [(c.v_bits, c.u_bits, c.directions) for c in spec.classes]
        packed = PackedFactors.from_payload(payload, spec.shape, classes, spec.row_scale)
    else:
        packed = PackedMatrix.from_payload(payload, spec.shape, spec.bits)
    module, name = site.module, site.parts[part]
    if isinstance(module, resolve("VocabParallelEmbedding")):
        _check_shape(delta, name, (module.org_vocab_size, module.embedding_dim), (rows, cols))
        (start, stop), (first, last) = vocabulary(module), (0, cols)
    else:
        width, length = output_widths(module)[part], input_width(module)
        start, first = output_start(module, part, width), input_start(module)
        stop, last = start + width, first + length
        whole = _whole_rows(module, part), module.input_size
        _check_shape(delta, name, whole, (rows, cols))
    if (start, stop) != (0, rows):
        packed = packed.slice_rows(start, stop)
    return packed if (first, last) == (0, cols) else packed.slice_cols(first, last)


def _whole_rows(linear: Any, part: int) -> int:
    """Rows of one slice's whole matrix."""
    width, size = output_widths(linear)[part], getattr(linear, "tp_size", 1)
    if isinstance(linear, (resolve("RowParallelLinear"), resolve("ReplicatedLinear"))):
        return width
    if isinstance(linear, resolve("QKVParallelLinear")) and part > 0:
        size //= linear.num_kv_head_replicas
    return width * size


def _bias(delta: Delta, site: SiteModule, tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Fine-tuned bias less the base's, float32 [output rows of this rank]."""
    module = site.module
    if isinstance(module, resolve("RowParallelLinear")) and module.tp_rank > 0:
        return None  # the bias is added once, on the first rank
    base, widths = module.bias, output_widths(module)
    total = torch.zeros(sum(widths))
    start = 0
    for i, (tensor, width) in enumerate(zip(tensors, widths, strict=True)):
        if tensor is not None:
            _check_shape(delta, site.parts[i], (_whole_rows(module, i),), tuple(tensor.shape))
            first = output_start(module, i, width)
            total[start : start + width] = tensor[first : first + width].float()
            if base is not None:
                total[start : start + width] -= base[start : start + width].float().cpu()
        start += width
    return total


def _check_shape(delta: Delta, name: str, expected: tuple, found: tuple) -> None:
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
