"""Widths for V and U of each direction, chosen together under a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_prinmix.compress.allocation.allocate import Allocation, allocate
from vllm_prinmix.kernels.packing import DIRECTION_BYTES, row_bytes

APART = 2  # bits by which the widths of V and U of a direction may differ


@dataclass(frozen=True)
class Pair:
    """Widths of one direction."""

    v: int
    u: int


def choose_pairs(
    v_errors: np.ndarray,
    u_errors: np.ndarray,
    dropped: np.ndarray,
    bits: tuple[int, ...],
    rows: int,
    cols: int,
    budget_bytes: int,
    max_classes: int,
    separate: bool = True,
    *,
    solver: str = "exact",
    rank_penalty: float = 0.0,
) -> tuple[list[Pair | None], Allocation]:
    """The pair of each direction (None: dropped) with the least sum of errors, and its certificate.

    ``v_errors`` and ``u_errors`` float64 [n, len(bits)]: what quantizing V or U of a direction to each width
    costs; ``dropped`` float64 [n]: what leaving it out does. At most ``max_classes`` pairs are used.
    ``solver`` and ``rank_penalty``: see `allocate`, whose Eq. 8 this is with pairs as the candidates.
    """
    pairs = [Pair(v, u) for v in bits for u in bits if (abs(v - u) <= APART if separate else v == u)]
    cost = [0, *(_bytes(pair, rows, cols) for pair in pairs)]
    v_at = [bits.index(pair.v) for pair in pairs]
    u_at = [bits.index(pair.u) for pair in pairs]
    errors = np.concatenate([dropped[:, None], v_errors[:, v_at] + u_errors[:, u_at]], axis=1)
    found = allocate(errors, cost, budget_bytes, max_classes, solver, free=0, rank_penalty=rank_penalty)
    return [None if c == 0 else pairs[c - 1] for c in found.choice.tolist()], found


def _bytes(pair: Pair, rows: int, cols: int) -> int:
    return row_bytes(pair.v, cols) + row_bytes(pair.u, rows) + DIRECTION_BYTES
