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

# Sets of columns looked at. Real tables need up to 200; where this is not enough, the bound says so.
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

    def settle(subset: np.ndarray) -> bool:
        """Looks for a better choice in ``subset``; whether it has none now that keeps to ``max_active``."""
        nonlocal best, best_error, bound
        part, prices = errors[:, subset], cost[subset]
        if len(part) * prices[0] > capacity:
            return True
        relaxation = relax(part, prices, capacity)
        if relaxation.value >= best_error * (1 - EPSILON):
            return True
        small = counts[subset].sum() <= max_active
        if small:
            choice = fill(part, prices, capacity, relaxation.choice)
            if (error := total(part, choice)) < best_error:
                best, best_error = subset[choice], error
        better, proved = close_gap(part, prices, capacity, relaxation, best_error)
        if better is not None:
            if counts[np.unique(subset[better])].sum() > max_active:
                return False
            best, best_error = subset[better], total(part, better)
        elif small and not proved:
            bound = min(bound, relaxation.value)
        return proved

    # Any multiplier gives bounds; those of good sets give tight ones where they matter.
    multiplier = relax(errors, cost, capacity).multiplier
    subset = _Sets(errors + multiplier * cost, counts, max_active).greedy()
    multiplier = relax(errors[:, subset], cost[subset], capacity).multiplier
    sets = _Sets(errors + multiplier * cost, counts, max_active)
    for value, _, used in sets.below_limit():
        if len(errors) * cost[used[0]] <= capacity:
            sets.limit, subset = value, used
    multiplier = relax(errors[:, subset], cost[subset], capacity).multiplier
    settle(subset)
    sets = _Sets(errors + multiplier * cost, counts, max_active)
    spent = multiplier * capacity
    sets.limit = best_error * (1 - EPSILON) + spent
    for _, subset, _ in sets.below_limit():
        sets.settled = settle(subset)
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
        self.settled = False  # of the columns that `below_limit` gave last: nothing of them is of interest
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
            _, losses, _ = self._look(allowed)
            allowed[np.where(allowed & allowed_to_go, losses, np.inf).argmin()] = False
        return np.flatnonzero(allowed)

    def below_limit(self) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        """Columns whose minima have a sum below the limit, and need few enough columns: sum, columns, those.

        Of more columns than a set may have the smaller sets follow, unless they are `settled`.
        """
        allowed = np.ones(self._columns, dtype=bool)
        # Sets between ``kept`` and ``allowed``, with what `_look` says of ``allowed``.
        todo = [(allowed, ~self._counts, *self._look(allowed))]
        for _ in range(MAX_NODES):
            if not todo:
                return
            allowed, kept, value, losses, needed = todo.pop()
            bound = self._bound(allowed, kept, value, losses)
            if bound >= self.limit:
                continue
            last = allowed.sum() <= self._size
            used = allowed if last else needed | ~self._counts
            if used.sum() <= self._size:
                self.settled = last
                yield value, np.flatnonzero(allowed), np.flatnonzero(used)
                if last or self.settled or bound >= self.limit:
                    continue
            column = np.where(allowed & ~kept, losses, -1.0).argmax()
            without, with_it = allowed.copy(), kept.copy()
            without[column], with_it[column] = False, True
            todo.append((without, kept, *self._look(without)))
            if with_it.sum() < self._size:
                todo.append((allowed, with_it, value, losses, needed))
            else:
                todo.append((with_it, with_it, *self._look(with_it)))
        self.unseen = min((self._bound(*node[:4]) for node in todo), default=np.inf)

    def _bound(self, allowed: np.ndarray, kept: np.ndarray, value: float, losses: np.ndarray) -> float:
        surplus = int(allowed.sum()) - self._size
        return value + float(np.sort(losses[allowed & ~kept])[: max(surplus, 0)].sum())

    def _look(self, allowed: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The sum of the minima over ``allowed``, by how much it rises without each column, those needed."""
        columns = np.flatnonzero(allowed)
        part = self._penalised[:, columns]
        first = part.argmin(axis=1)
        least = part[np.arange(len(part)), first]
        losses, needed = np.full(self._columns, np.inf), np.zeros(self._columns, dtype=bool)
        needed[columns[first]] = True
        if len(columns) > 1:
            part[np.arange(len(part)), first] = np.inf
            rises = part.min(axis=1) - least
            losses[columns] = np.bincount(first, weights=rises, minlength=len(columns))
        return self._constant + float(least.sum()), losses, needed
