"""Eq. 8 as what it is: the best set of active columns, and the knapsack of each set that may be the best.

At a fixed price of a byte (a Lagrange multiplier) a set's bound is the sum of its columns' minima over rows.
Taking a column out raises it by a loss that only grows as other columns leave (the sum is supermodular), so
what the smallest losses add up to bounds every set below: branch and bound over sets then needs dozens of
steps where there are hundred thousands of sets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_prinmix.compress.allocation.knapsack import EPSILON, close_gap, fill, relax, total

# Sets of columns looked at. Real tables need a hundred; where this is not enough, the bound says so.
MAX_NODES = 20_000


def solve(
    errors: np.ndarray, cost: np.ndarray, capacity: int, max_active: int, free: int | None = None
) -> tuple[np.ndarray, float] | None:
    """The column of each row with the least sum of errors, and a lower bound of that sum.

    ``errors`` float64 [n, B], at least 0; ``cost`` int64 [B], that of a column in any row. At most
    ``capacity`` is spent, and at most ``max_active`` columns are used; column ``free`` does not count.
    Returns int64 [n] and the bound, which equals the sum but for float64 rounding, unless MAX_STATES or
    MAX_NODES were not enough. None where nothing fits.
    """
    order = _useful(errors, cost, free)
    errors, cost = errors[:, order], cost[order]
    if len(errors) * cost[0] > capacity:
        return None
    counts = order != free
    best, best_error, bound = np.zeros(len(errors), dtype=np.int64), np.inf, np.inf

    def improve(subset: np.ndarray) -> float:
        """Solves one set's knapsack, as far as it can hold a better choice; its best multiplier."""
        nonlocal best, best_error, bound
        part, prices = errors[:, subset], cost[subset]
        relaxation = relax(part, prices, capacity)
        if relaxation.value < best_error * (1 - EPSILON):
            choice = fill(part, prices, capacity, relaxation.choice)
            if (error := total(part, choice)) < best_error:
                best, best_error = subset[choice], error
            better, proved = close_gap(part, prices, capacity, relaxation, best_error)
            if better is not None:
                best, best_error = subset[better], total(part, better)
            if not proved:
                bound = min(bound, relaxation.value)
        return relaxation.multiplier

    # Any multiplier gives bounds; those of good sets give tight ones where they matter.
    multiplier = relax(errors, cost, capacity).multiplier
    subset = _Sets(errors + multiplier * cost, counts, max_active).greedy()
    multiplier = relax(errors[:, subset], cost[subset], capacity).multiplier
    sets = _Sets(errors + multiplier * cost, counts, max_active)
    for value, candidate in sets.below_limit():
        if len(errors) * cost[candidate[0]] <= capacity:
            sets.limit, subset = value, candidate
    multiplier = improve(subset)
    sets = _Sets(errors + multiplier * cost, counts, max_active)
    spent = multiplier * capacity
    sets.limit = best_error * (1 - EPSILON) + spent
    for _, subset in sets.below_limit():
        if len(errors) * cost[subset[0]] <= capacity:
            improve(subset)
            sets.limit = best_error * (1 - EPSILON) + spent
    return order[best], min(bound, sets.unseen - spent, best_error)


def _useful(errors: np.ndarray, cost: np.ndarray, free: int | None) -> np.ndarray:
    """Columns by ascending cost, without those that a cheaper one replaces in every row."""
    order = np.argsort(cost, kind="stable")
    columns = np.ascontiguousarray(errors.T)[order]
    better = [(columns[:i] <= columns[i]).all(axis=1).any() and c != free for i, c in enumerate(order)]
    return order[~np.array(better)]


class _Sets:
    """Sets of at most ``max_active`` counted columns, by the sum of their minima over rows.

    ``penalised`` float64 [n, B], the first column the cheapest; ``counts`` bool [B]: columns that count
    towards ``max_active``, the others are in every set.
    """

    def __init__(self, penalised: np.ndarray, counts: np.ndarray, max_active: int) -> None:
        self.limit = np.inf  # only sets with a smaller sum count; may be lowered any time
        self.unseen = np.inf  # a lower bound of all sets that `below_limit` did not come to
        self._columns = len(counts)
        self._counts = counts
        self._size = min(max_active + int((~counts).sum()), len(counts))
        # Rows that are best served by a column of every set add the same to all.
        always = penalised[:, ~counts].min(axis=1, initial=np.inf)
        open_ = always > penalised.min(axis=1)
        self._constant = float(always[~open_].sum())
        self._penalised = penalised[open_]

    def greedy(self) -> np.ndarray:
        """Columns taken out one by one, always the one that is missed least; the cheapest stays."""
        allowed = np.ones(self._columns, dtype=bool)
        allowed_to_go = self._counts.copy()
        allowed_to_go[0] = False
        while allowed.sum() > self._size:
            _, losses = self._look(allowed)
            allowed[np.where(allowed & allowed_to_go, losses, np.inf).argmin()] = False
        return np.flatnonzero(allowed)

    def below_limit(self) -> Iterator[tuple[float, np.ndarray]]:
        """Every set of the largest size whose sum is below the limit: sum and columns, ascending."""
        allowed = np.ones(self._columns, dtype=bool)
        # Sets between ``kept`` and ``allowed``, with the sum and the losses of ``allowed``.
        todo = [(allowed, ~self._counts, *self._look(allowed))]
        for _ in range(MAX_NODES):
            if not todo:
                return
            allowed, kept, value, losses = todo.pop()
            if self._bound(allowed, kept, value, losses) >= self.limit:
                continue
            if allowed.sum() <= self._size:
                yield value, np.flatnonzero(allowed)
                continue
            column = np.where(allowed & ~kept, losses, -1.0).argmax()
            without, with_it = allowed.copy(), kept.copy()
            without[column], with_it[column] = False, True
            todo.append((without, kept, *self._look(without)))
            if with_it.sum() < self._size:
                todo.append((allowed, with_it, value, losses))
            else:
                todo.append((with_it, with_it, *self._look(with_it)))
        self.unseen = min((self._bound(*node) for node in todo), default=np.inf)

    def _bound(self, allowed: np.ndarray, kept: np.ndarray, value: float, losses: np.ndarray) -> float:
        surplus = int(allowed.sum()) - self._size
        return value + float(np.sort(losses[allowed & ~kept])[: max(surplus, 0)].sum())

    def _look(self, allowed: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of the minima over ``allowed``, and by how much it rises without each of its columns."""
        columns = np.flatnonzero(allowed)
        losses = np.full(self._columns, np.inf)
        part = self._penalised[:, columns]
        if len(columns) == 1:
            return self._constant + float(part.sum()), losses
        two = np.argpartition(part, 1, axis=1)[:, :2]
        values = np.take_along_axis(part, two, axis=1)
        first = np.where(values[:, 0] <= values[:, 1], two[:, 0], two[:, 1])
        losses[columns] = np.bincount(
            first, weights=np.abs(values[:, 0] - values[:, 1]), minlength=len(columns)
        )
        return self._constant + float(values.min(axis=1).sum()), losses
