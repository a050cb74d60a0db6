"""A shared budget: the best split, and all of it."""

from __future__ import annotations

import itertools

import pytest

from vllm_prinmix.compress.allocation.budgets import Curve, share


def test_the_split_is_the_best_one() -> None:
    """Against every split, for convex curves in steps of ten bytes."""
    points = range(10, 101, 10)
    falls = {"a": 0.97, "b": 0.9, "c": 0.99}
    curves = {name: Curve(list(points), [fall**size for size in points]) for name, fall in falls.items()}
    found = share(curves, 150)
    assert sum(found.values()) == 150
    best = min(
        sum(fall**size for fall, size in zip(falls.values(), sizes, strict=True))
        for sizes in itertools.product(points, repeat=3)
        if sum(sizes) <= 150
    )
    assert sum(falls[name] ** size for name, size in found.items()) == pytest.approx(best)


def test_a_step_that_buys_nothing_is_not_paid_for_unless_more_follows() -> None:
    curves = {"flat": Curve([10, 20, 30], [0.5, 0.5, 0.5]), "late": Curve([10, 20, 30], [0.5, 0.5, 0.1])}
    assert share(curves, 100) == {"flat": 10, "late": 30}
    assert share(curves, 30) == {"flat": 10, "late": 20}
    with pytest.raises(ValueError, match="more than the budget"):
        share(curves, 19)
