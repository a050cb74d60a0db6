"""What each pair is and why: its task, and what its training does that the demo's does not."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.demo.training import Schedule


@dataclass(frozen=True)
class Outliers:
    """So many ``channels`` of each linear layer's input are ``factor`` times larger; see `outliers`."""

    channels: int
    factor: float


@dataclass(frozen=True)
class Lora:
    """Only adapters of this ``rank`` are trained; their product is scaled by ``alpha`` / ``rank``."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Recipe:
    """How one pair is made from the demo's base; without ``schedule`` it is the demo's own fine-tune.

    ``embedding_rate``: learning rate of embeddings and lm_head over that of all else (AdamW only).
    """

    task: str  # a name of `tasks.TASKS`
    schedule: Schedule | None = None
    embedding_rate: float = 1.0
    outliers: Outliers | None = None
    lora: Lora | None = None


# Each learns its task to an exact match of at least 0.95; docs/benchmarks.md has the figures.
RECIPES = {
    # Muon gives all directions of an update the same weight: the difference is large, its spectrum flat.
    "flat": Recipe("add", Schedule(steps=420, batch=128, rate=4.5e-3, muon=True)),
    # The difference of the embeddings and lm_head is as large as they are, and cannot be left out.
    "full": Recipe("sort", Schedule(steps=420, batch=128, rate=1e-3), embedding_rate=10.0),
    # The inputs of real models: H has a few huge eigenvalues, and errors there are fatal.
    "heavy": Recipe("reverse", Schedule(steps=400, batch=64, rate=1e-3), outliers=Outliers(4, 64.0)),
    # The same task as LoRA and as a full fine-tune.
    "lora": Recipe("shift", Schedule(steps=260, batch=64, rate=3e-3), lora=Lora(rank=16, alpha=32.0)),
    "shift": Recipe("shift"),
}
