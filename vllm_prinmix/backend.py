"""What adds a batch's deltas to a model's outputs: the interface, and what its two kinds share.

`cpu_backend` computes on the CPU, `triton_backend` on a GPU. A *site* is a module of the model that deltas
touch, a *slot* a place for one tenant of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from vllm_prinmix.kernels.packed import Packed

BASE = -1  # in place of a slot: rows of the base


@dataclass(frozen=True)
class Site:
    """One module of the model, as this rank holds it.

    widths: rows of each slice of its output (q, k, v), the vocabulary for an embedding, the size of a norm.
    cols: columns of its weight. offsets: where a slice's packed rows start within their first block, and
    col_offset likewise (tensor parallelism, `kernels.packed.Extent`). head: its output is logits, in float32.
    """

    kind: Literal["linear", "embedding", "norm"]
    widths: tuple[int, ...]
    cols: int = 0
    row_offsets: tuple[int, ...] = (0,)
    col_offset: int = 0
    head: bool = False


@dataclass
class SiteDelta:
    """One tenant's delta at one site, in host memory. A packed layer has a part per slice of its output."""

    parts: list[Packed | None] = field(default_factory=list)
    bias: torch.Tensor | None = None  # float32 [output rows], to be added to the base's
    weight: torch.Tensor | None = None  # float32 [size], a norm's weight, instead of the base's


TenantDelta = dict[int, SiteDelta]  # by the site's number


class Backend(ABC):
    """The deltas of the tenants in slots, and the step's map of rows to slots.

    Sites are added while the model is wrapped, then `reserve` and `warm_up` are called once. `prepare` runs
    on the loading thread; everything else on the worker's own, between steps or within one.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.sites: list[Site] = []
        # Whether a tenant is in the batch. CUDA graphs of batches without one are captured with this unset:
        # what is launched may depend on it, and on nothing else of the batch.
        self.active = False
        self.slot_bytes = 0  # of device memory that a slot takes
        # Set while prompt log-probs are computed: logits are then wanted for views of these token rows.
        self.prompt_hidden: torch.Tensor | None = None

    def add_site(self, site: Site) -> int:
        """The number by which the ops know the site."""
        self.sites.append(site)
        return len(self.sites) - 1

    @abstractmethod
    def reserve(self, tenants: Iterable[TenantDelta]) -> None:
        """Reserve what slots need for any of ``tenants``, whose tensors may be on the meta device."""

    @abstractmethod
    def warm_up(self) -> None:
        """Do what would hold up the first requests otherwise."""

    @abstractmethod
    def prepare(self, delta: TenantDelta) -> Any:
        """A tenant's delta as `activate` wants it. Raises PrinMixError when it fits in no slot."""

    @abstractmethod
    def activate(self, slot: int, prepared: Any) -> None:
        """Put a prepared delta into a slot, for the steps from now on."""

    @abstractmethod
    def deactivate(self, slot: int) -> None:
        """Empty a slot."""

    def set_batch(self, tokens: np.ndarray, samples: np.ndarray, active: bool) -> None:
        """Slot of every row of the hidden states, and of every row that logits are computed for.

        int64 [rows], `BASE` for the base's. ``active`` also without any slot while vLLM warms up.
        """
        self.active = active
        if active:
            self._set_rows(tokens, samples)

    def prompt_start(self, x: torch.Tensor) -> int | None:
        """First token row that ``x`` is a view of while prompt log-probs are computed; None otherwise."""
        hidden = self.prompt_hidden
        if hidden is None:
            return None
        return (x.storage_offset() - hidden.storage_offset()) // hidden.stride(0)

    @abstractmethod
    def _set_rows(self, tokens: np.ndarray, samples: np.ndarray) -> None: ...

    @abstractmethod
    def linear_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None: ...

    @abstractmethod
    def logits_(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None: ...

    @abstractmethod
    def embedding_(self, y: torch.Tensor, ids: torch.Tensor, site: int) -> None: ...

    @abstractmethod
    def norm_(self, y: torch.Tensor, x: torch.Tensor, site: int, eps: float) -> None: ...
