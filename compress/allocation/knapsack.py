"""Eq. 8 as what it is: a multiple-choice knapsack for every set of widths that may be active, solved exactly.

With the budget as a penalty (a Lagrange multiplier) the choice of each direction is independent of the
others, and the best multiplier bounds the optimum from below, usually to many digits. Only few directions are
undecided between that bound and the best known solution; dynamic programming over those closes the gap
(after Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

# Sums of n float64 terms are equal where they differ by less, relatively.
EPSILON = 1e-12
# Partial solutions kept in all, 9 bytes each. Real tables need a few thousand; where this is not enough, the
# best solution found is returned with its bound.
MAX_STATES = 1 << 24


@dataclass(frozen=True)
class Relaxation:
    """A knapsack's Lagrangian optimum: error >= value for every choice that fits."""

    multiplier: float  # error per unit of cost
    value: float
    choice: np.ndarray  # int64 [n]: fits, and is optimal for what it costs


def solve(
    errors: np.ndarray, cost: np.ndarray, capacity: int, max_active: int
) -> tuple[np.ndarray, float] | None:
    """The column of each row with the least sum of errors, and a lower bound of that sum.

    ``errors`` float64 [n, B], at least 0; ``cost`` int64 [B], that of a column in any row. At most
    ``capacity`` is spent, and at most ``max_active`` columns are used. Returns int64 [n] and the bound, which
    equals the sum but for float64 rounding, unless MAX_STATES was not enough. None where nothing fits.
    """
    n, widths = errors.shape
    subsets = [
        list(subset)
        for subset in combinations(np.argsort(cost, kind="stable").tolist(), min(max_active, widths))
        if n * cost[subset[0]] <= capacity
    ]
    if not subsets:
        return None
    everything = np.argsort(cost, kind="stable")
    multiplier = relax(errors[:, everything], cost[everything], capacity).multiplier
    # Any multiplier gives a bound: this one's order the subsets and discards most of them at once.
    penalised = errors + multiplier * cost
    bounds = [penalised[:, subset].min(axis=1).sum() - multiplier * capacity for subset in subsets]
    best, best_error = np.zeros(n, dtype=np.int64), np.inf  # of columns, and its sum of errors
    relaxations: list[tuple[list[int], Relaxation]] = []
    for index in np.argsort(bounds, kind="stable"):
        if bounds[index] >= best_error:
            break
        subset = subsets[index]
        part = errors[:, subset]
        relaxation = relax(part, cost[subset], capacity)
        relaxations.append((subset, relaxation))
        choice = fill(part, cost[subset], capacity, relaxation.choice)
        error = _total(part, choice)
        if error < best_error:
            best, best_error = np.array(subset)[choice], error
    bound = best_error
    for subset, relaxation in sorted(relaxations, key=lambda pair: pair[1].value):
        if relaxation.value >= best_error * (1 - EPSILON):
            break
        part = errors[:, subset]
        better, proved = close_gap(part, cost[subset], capacity, relaxation, best_error)
        if better is not None:
            best, best_error = np.array(subset)[better], _total(part, better)
        if not proved:
            bound = min(bound, relaxation.value)
    return best, min(bound, best_error)


def relax(errors: np.ndarray, cost: np.ndarray, capacity: int) -> Relaxation:
    """The best Lagrange multiplier of a knapsack; ``cost`` ascends, its first entry fits for all rows.

    The bound is a concave function of the multiplier, the minimum of one line per choice. From the line of
    the cheapest choice and that of the choice without a budget, the crossing point is replaced by the line
    that is lowest there, until there is none: the exact maximum after a dozen steps.
    """

    def line(multiplier: float) -> tuple[np.ndarray, float, int]:
        choice = (errors + multiplier * cost).argmin(axis=1)
        return choice, _total(errors, choice), int(cost[choice].sum())

    choice, low_error, low_cost = line(0.0)
    if low_cost <= capacity:
        return Relaxation(0.0, low_error, choice)
    fitting = np.zeros(len(errors), dtype=np.int64)
    high_error, high_cost = _total(errors, fitting), int(cost[fitting].sum())
    while True:
        multiplier = (high_error - low_error) / (low_cost - high_cost)
        choice, error, spent = line(multiplier)
        if error + multiplier * spent >= (low_error + multiplier * low_cost) * (1 - EPSILON):
            return Relaxation(multiplier, error + multiplier * (spent - capacity), fitting)
        if spent <= capacity:
            fitting, high_error, high_cost = choice, error, spent
        else:
            low_error, low_cost = error, spent


def fill(errors: np.ndarray, cost: np.ndarray, capacity: int, choice: np.ndarray) -> np.ndarray:
    """``choice`` improved: what is left of the capacity goes, change by change, to the largest gain."""
    choice = choice.copy()
    rows = np.arange(len(errors))
    while True:
        gain = errors[rows, choice][:, None] - errors
        gain[cost - cost[choice][:, None] > capacity - cost[choice].sum()] = 0
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        if gain[row, column] <= 0:
            return choice
        choice[row] = column


def close_gap(
    errors: np.ndarray, cost: np.ndarray, capacity: int, relaxation: Relaxation, best_error: float
) -> tuple[np.ndarray | None, bool]:
    """A choice better than ``best_error`` (the optimum) or None, and whether that is proved.

    Every choice has the error  bound + its regrets + multiplier * unspent capacity, where a row's regret is
    its penalised error less the row's smallest. A better choice keeps the last two terms below
    best_error - bound: that leaves most rows one column, and few combinations of the others.
    """
    multiplier = relaxation.multiplier
    penalised = errors + multiplier * cost
    choice = penalised.argmin(axis=1)
    regrets = penalised - penalised.min(axis=1, keepdims=True)
    room = best_error - relaxation.value
    undecided = np.flatnonzero((regrets < room).sum(axis=1) > 1)
    options = [np.flatnonzero(regrets[row] < room) for row in undecided]
    changes = [cost[option] - cost[choice[row]] for row, option in zip(undecided, options, strict=True)]
    # The least and the most that the rows still to come can add to the cost.
    least = np.cumsum([0] + [change.min() for change in changes[::-1]])[::-1]
    most = np.cumsum([0] + [change.max() for change in changes[::-1]])[::-1]
    left = capacity - int(cost[choice].sum())  # what the states below may add to the cost; may be negative
    spent, regret = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    states = 0
    for step, (row, option, change) in enumerate(zip(undecided, options, changes, strict=True), start=1):
        parent = np.repeat(np.arange(len(spent), dtype=np.int64), len(option))
        column = np.tile(option.astype(np.int8), len(spent))
        spent = (spent[:, None] + change).ravel()
        regret = (regret[:, None] + regrets[row, option]).ravel()
        unspent = np.maximum(left - spent - most[step], 0)
        kept = np.flatnonzero((spent + least[step] <= left) & (regret + multiplier * unspent < room))
        # Of two states the one with less cost and less error stays.
        kept = kept[np.lexsort((regret[kept], spent[kept]))]
        error = regret[kept] - multiplier * spent[kept]
        kept = kept[error < np.concatenate(([np.inf], np.minimum.accumulate(error)[:-1]))]
        spent, regret = spent[kept], regret[kept]
        history.append((parent[kept], column[kept]))
        states += len(kept)
        if states > MAX_STATES:
            return None, False
        if not len(kept):
            return None, True
    final = regret + multiplier * (left - spent)
    state = int(final.argmin())
    if final[state] >= room:
        return None, True
    for row, (parent, column) in zip(undecided[::-1], history[::-1], strict=True):
        choice[row] = column[state]
        state = parent[state]
    return choice, True


def _total(errors: np.ndarray, choice: np.ndarray) -> float:
    return float(errors[np.arange(len(errors)), choice].sum())
