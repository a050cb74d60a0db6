"""The custom ops that add a batch's deltas to a module's output, and the step's map of rows to tenants.

Custom ops, because torch.compile must keep them whole and may not bake in which tenants are in a batch: an
op gets tensors and the number of its site, and looks the rest up here. One model per worker process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from vllm_prinmix.kernels import cpu, native
from vllm_prinmix.kernels.packed import Packed, PackedFactors


@dataclass
class SiteDelta:
    """One tenant's delta at one site. A packed layer (qkv, gate_up) has a part per slice of its output."""

    parts: list[Packed | None] = field(default_factory=list)
    bias: torch.Tensor | None = None  # [output rows], to be added to the base's
    weight: torch.Tensor | None = None  # a norm's weight, instead of the base's
    compiled: native.SiteFactors | None = None  # the parts, as the compiled CPU kernels take them

    def prepare(self, widths: tuple[int, ...], transposed: bool = False) -> None:
        """Describe the parts for the compiled CPU kernels, where these can do all of them.

        ``widths`` as in `Site`; ``transposed`` for an embedding.
        """
        starts = itertools.accumulate(widths[:-1], initial=0)
        parts = [(part, start) for part, start in zip(self.parts, starts, strict=True) if part is not None]
        packed = [(part, start) for part, start in parts if isinstance(part, PackedFactors)]
        on_cpu = all(part.scale.device.type == "cpu" for part, _ in packed)
        if packed and len(packed) == len(parts) and on_cpu and native.library() is not None:
            self.compiled = native.SiteFactors(packed, transposed)


@dataclass
class Site:
    """One module of the model that deltas touch: the widths of its output's slices, and a delta per slot."""

    widths: tuple[int, ...]
    slots: list[SiteDelta | None]  # None where the tenant leaves the site as the base has it


@dataclass
class Rows:
    """Which rows of a batch belong to which tenant: (slot, indices), base rows in none."""

    groups: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def window(self, start: int, length: int) -> Rows:
        """The same for a slice of the rows."""
        cut = [(slot, rows[(rows >= start) & (rows < start + length)] - start) for slot, rows in self.groups]
        return Rows([(slot, rows) for slot, rows in cut if rows.numel()])


@dataclass
class Step:
    """State of the forward pass under way."""

    tokens: Rows = field(default_factory=Rows)  # rows of the hidden states
    samples: Rows = field(default_factory=Rows)  # rows that logits are computed for
    # Set while prompt log-probs are computed: logits are then wanted for views of these token rows.
    prompt_hidden: torch.Tensor | None = None


step = Step()
sites: list[Site] = []


def reset() -> None:
    """Forget all sites and the step: a process may load a second model."""
    global step
    sites.clear()
    step = Step()


def linear_(y: torch.Tensor, x: torch.Tensor, site: int) -> None:
    """y [tokens, rows] += x [tokens, cols] dW^T + bias, for the rows of tenants; base rows stay untouched."""
    _add_linear(y, x, site, step.tokens)


def logits_(y: torch.Tensor, x: torch.Tensor, site: int) -> None:
    """As `linear_`, for the language-model head, which sees only the rows that are sampled from."""
    hidden = step.prompt_hidden
    if hidden is None:
        rows = step.samples
    else:
        start = (x.storage_offset() - hidden.storage_offset()) // hidden.stride(0)
        rows = step.tokens.window(start, x.shape[0])
    _add_linear(y, x, site, rows)


def embedding_(y: torch.Tensor, ids: torch.Tensor, site: int) -> None:
    """y [tokens, hidden] += dE[ids]; ids outside the table (padding, another rank's shard) add nothing."""
    for slot, rows in step.tokens.groups:
        delta = sites[site].slots[slot]
        if delta is None or delta.parts[0] is None:
            continue
        part = delta.parts[0]
        wanted = ids[rows]
        known = (wanted >= 0) & (wanted < part.rows.length)
        inside = wanted.clamp(0, part.rows.length - 1)
        if delta.compiled is not None and isinstance(part, PackedFactors):
            values = native.expand(cpu.gather(inside, part), delta.compiled, part.cols.length)
        else:
            values = cpu.embedding(inside, part)
        _add(y, rows, values * known[:, None])


def norm_(y: torch.Tensor, x: torch.Tensor, site: int, eps: float) -> None:
    """y [..., hidden] = RMSNorm(x [..., hidden]) with the tenant's weight, for the rows of tenants.

    The first dimension counts tokens; a norm over heads sees x as [tokens, heads, head size].
    """
    for slot, rows in step.tokens.groups:
        delta = sites[site].slots[slot]
        if delta is None or delta.weight is None:
            continue
        y[rows] = _finite(cpu.rms_norm(x[rows].float(), delta.weight, eps), y.dtype)


def _add_linear(y: torch.Tensor, x: torch.Tensor, site: int, batch: Rows) -> None:
    fast = []
    for slot, rows in batch.groups:
        delta = sites[site].slots[slot]
        if delta is None:
            continue
        if delta.compiled is not None:
            fast.append((rows, delta, delta.compiled))
            continue
        inputs, start = x[rows].float(), 0
        outputs = torch.zeros(rows.numel(), y.shape[1], dtype=torch.float32, device=y.device)
        for part, width in zip(delta.parts, sites[site].widths, strict=True):
            if part is not None:
                # Fewer rows than the slice where the vocabulary is padded.
                outputs[:, start : start + part.rows.length] = cpu.linear(inputs, part)
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


def _nothing(*args: object) -> None:
    """What an op does to fake tensors: it changes y in place and returns nothing."""


_library = torch.library.Library("prinmix", "DEF")
for _name, _schema, _function in (
    ("linear_", "(Tensor(a!) y, Tensor x, int site) -> ()", linear_),
    ("logits_", "(Tensor(a!) y, Tensor x, int site) -> ()", logits_),
    ("embedding_", "(Tensor(a!) y, Tensor ids, int site) -> ()", embedding_),
    ("norm_", "(Tensor(a!) y, Tensor x, int site, float eps) -> ()", norm_),
):
    _library.define(_name + _schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prinmix::{_name}", _nothing, lib=_library)
