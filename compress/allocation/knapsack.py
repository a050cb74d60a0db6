"""A multiple-choice knapsack, solved exactly: a column for each row, under one budget.

With the budget as a penalty (a Lagrange multiplier) the choice of each direction is independent of the
others, and the best multiplier bounds the optimum from below, usually to many digits. Only few directions are
undecided between that bound and the best known solution; dynamic programming over those closes the gap
(after Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

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


def relax(errors: np.ndarray, cost: np.ndarray, capacity: int) -> Relaxation:
    """The best Lagrange multiplier of a knapsack; ``cost`` ascends, its first entry fits for all rows.

    The bound is a concave function of the multiplier, the minimum of one line per choice. From the line of
    the cheapest choice and that of the choice without a budget, the crossing point is replaced by the line
    that is lowest there, until there is none: the exact maximum after a dozen steps.
    """

    def line(multiplier: float) -> tuple[np.ndarray, float, int]:
        choice = (errors + multiplier * cost).argmin(axis=1)
        return choice, total(errors, choice), int(cost[choice].sum())

    choice, low_error, low_cost = line(0.0)
    if low_cost <= capacity:
        return Relaxation(0.0, low_error, choice)
    fitting = np.zeros(len(errors), dtype=np.int64)
    high_error, high_cost = total(errors, fitting), int(cost[fitting].sum())
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
    best_error - bound: that leaves few changes of the choice without regrets, cheap ones first.
    """
    multiplier, room = relaxation.multiplier, best_error - relaxation.value
    penalised = errors + multiplier * cost
    choice = penalised.argmin(axis=1)
    changes = _Changes(penalised - penalised.min(axis=1, keepdims=True), cost - cost[choice][:, None], room)
    # States are sets of changes: what they add to the cost, ascending, and their regrets.
    spent, regret = np.zeros(1, dtype=np.int64), np.zeros(1)
    left = capacity - int(cost[choice].sum())  # what they may add at most; negative where they have to save
    history: list[tuple[np.ndarray, np.ndarray]] = []  # of each step's states, parent and change (-1: none)
    best: tuple[int, int] | None = None  # step and state
    if left >= 0 and multiplier * left < room:
        best, room = (0, 0), multiplier * left
    states = 0
    for step, (start, end) in enumerate(changes.steps()):
        unspent = left - spent
        up, down = min(multiplier, changes.up[start]), changes.down[start]
        bound = regret + np.where(unspent > 0, unspent * up, -unspent * down)
        kept = np.flatnonzero((bound < room) & (regret + changes.regret[start] < room))
        if not len(kept):
            break
        options = np.arange(start - 1, end)
        options[0] = -1
        more, worse = changes.cost[start:end, None], changes.regret[start:end, None]
        spent = np.concatenate((spent[kept], (spent[kept] + more).ravel()))
        regret = np.concatenate((regret[kept], (regret[kept] + worse).ravel()))
        # Of two states the one with less cost and less error stays.
        order = np.argsort(spent, kind="stable")
        spent, regret = spent[order], regret[order]
        error = regret - multiplier * spent
        good = np.concatenate(([True], error[1:] < np.minimum.accumulate(error)[:-1]))
        good[:-1] &= (spent[1:] != spent[:-1]) | ~good[1:]
        order, spent, regret = order[good], spent[good], regret[good]
        history.append((kept[order % len(kept)], options[order // len(kept)]))
        states += len(order)
        if states > MAX_STATES:
            return None, False
        last = int(np.searchsorted(spent, left, side="right"))
        if last:  # of the states that fit, the one that spends most has the least error
            final = float(regret[last - 1] + multiplier * (left - spent[last - 1]))
            if final < room:
                best, room = (step + 1, last - 1), final
    if best is None:
        return None, True
    step, state = best
    for parents, taken in history[:step][::-1]:
        change = taken[state]
        if change >= 0:
            choice[changes.row[change]] = changes.column[change]
        state = parents[state]
    return choice, True


class _Changes:
    """What a better choice may do other than the choice without regrets: by row, least regrets first."""

    def __init__(self, regrets: np.ndarray, costs: np.ndarray, room: float) -> None:
        allowed = np.where(costs != 0, regrets, np.inf)
        row, column = np.nonzero(allowed < room)
        regret, first = allowed[row, column], allowed.min(axis=1)[row]
        order = np.lexsort((regret, row, first))
        self.row, self.column, self.regret = row[order], column[order], regret[order]
        self.cost = costs[self.row, self.column]
        # The least regret per unit of cost, added or saved, among a change and all after it.
        per_unit = self.regret / np.abs(self.cost)
        for name, mine in (("up", self.cost > 0), ("down", self.cost < 0)):
            ratio = np.where(mine, per_unit, room)  # costs are whole units: as good as infinite
            setattr(self, name, np.minimum.accumulate(ratio[::-1])[::-1])

    up: np.ndarray
    down: np.ndarray

    def steps(self) -> list[tuple[int, int]]:
        """First and last + 1 of each row's changes."""
        ends = [*(np.flatnonzero(np.diff(self.row)) + 1).tolist(), len(self.row)]
        return list(pairwise([0, *ends])) if len(self.row) else []


def total(errors: np.ndarray, choice: np.ndarray) -> float:
    return float(errors[np.arange(len(errors)), choice].sum())
