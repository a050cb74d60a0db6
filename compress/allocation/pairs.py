"""Widths for V and U of each direction, chosen together under a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_prinmix.compress.allocation import knapsack
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
) -> list[Pair | None]:
    """The pair of each direction (None: dropped) with the least sum of errors, and few different pairs.

    ``v_errors`` and ``u_errors`` float64 [n, len(bits)]: what quantizing V or U of a direction to each width
    costs; ``dropped`` float64 [n]: what leaving it out does. Pairs are taken out one by one, always the
    one that is missed least in the Lagrangian bound, until ``max_classes`` are left. For these the choice is
    optimal.
    """
    pairs = [Pair(v, u) for v in bits for u in bits if (abs(v - u) <= APART if separate else v == u)]
    cost = np.array([0, *(_bytes(pair, rows, cols) for pair in pairs)], dtype=np.int64)
    v_at = [bits.index(pair.v) for pair in pairs]
    u_at = [bits.index(pair.u) for pair in pairs]
    errors = np.concatenate([dropped[:, None], v_errors[:, v_at] + u_errors[:, u_at]], axis=1)
    capacity = min(budget_bytes, len(errors) * int(cost.max()))
    order = np.argsort(cost, kind="stable")
    columns = list(order)
    while True:
        relaxation = knapsack.relax(errors[:, columns], cost[columns], capacity)
        penalised = errors + relaxation.multiplier * cost
        used = np.unique(np.array(columns)[penalised[:, columns].argmin(axis=1)])
        columns = [c for c in columns if c == 0 or c in used]
        if len(columns) <= max_classes + 1:
            break
        losses = {
            c: penalised[:, [k for k in columns if k != c]].min(axis=1).sum() for c in columns if c != 0
        }
        columns.remove(min(losses, key=lambda c: losses[c]))
    found = knapsack.solve(errors[:, columns], cost[columns], capacity, len(columns))
    assert found is not None, "dropping every direction costs nothing"
    choice = np.array(columns)[found[0]]
    return [None if c == 0 else pairs[c - 1] for c in choice]


def _bytes(pair: Pair, rows: int, cols: int) -> int:
    return row_bytes(pair.v, cols) + row_bytes(pair.u, rows) + DIRECTION_BYTES
