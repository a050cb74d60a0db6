"""The custom ops that add a batch's deltas to a module's output.

Custom ops, because torch.compile must keep them whole and may not bake in which tenants are in a batch: an
op gets tensors and the number of its site, and the worker's backend knows the rest. One model per process.
"""

from __future__ import annotations

import torch

from vllm_prinmix.backend import Backend

backend: Backend | None = None


def use(new: Backend | None) -> None:
    """From now on ops go to ``new``; with None they do nothing."""
    global backend
    backend = new


def active() -> bool:
    """Whether a tenant is in the batch."""
    return backend is not None and backend.active


def linear_(y: torch.Tensor, x: torch.Tensor, site: int) -> None:
    """y [tokens, rows] += x [tokens, cols] dW^T + bias, for the rows of tenants; base rows stay untouched."""
    if backend is not None and backend.active:
        backend.linear_(y, x, site)


def logits_(y: torch.Tensor, x: torch.Tensor, site: int) -> None:
    """As `linear_`, for the language-model head, which sees only the rows that are sampled from."""
    if backend is not None and backend.active:
        backend.logits_(y, x, site)


def embedding_(y: torch.Tensor, ids: torch.Tensor, site: int) -> None:
    """y [tokens, hidden] += dE[ids]; ids outside the table (padding, another rank's shard) add nothing."""
    if backend is not None and backend.active:
        backend.embedding_(y, ids, site)


def norm_(y: torch.Tensor, x: torch.Tensor, site: int, eps: float) -> None:
    """y [..., hidden] = RMSNorm(x [..., hidden]) with the tenant's weight, for the rows of tenants.

    The first dimension counts tokens; a norm over heads sees x as [tokens, heads, head size].
    """
    if backend is not None and backend.active:
        backend.norm_(y, x, site, eps)


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
