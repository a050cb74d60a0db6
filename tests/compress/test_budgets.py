"""A shared budget: the best split, and all of it."""

from __future__ import annotations

import itertools

import pytest

from vllm_prinmix.compress.allocation.budgets import Curve, share


@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 8.0, "c": 3.0}])
def test_the_split_is_the_best_one(weights: dict[str, float] | None) -> None:
    """Against every split, for convex curves in steps of ten bytes."""
    points = range(10, 101, 10)
    falls = {"a": 0.97, "b": 0.9, "c": 0.99}
    curves = {name: Curve(list(points), [fall**size for size in points]) for name, fall in falls.items()}
    found = share(curves, 150, weights)
    weight = weights or dict.fromkeys(falls, 1.0)
    assert sum(found.values()) == 150
    best = min(
        sum(weight[name] * falls[name] ** size for name, size in zip(falls, sizes, strict=True))
        for sizes in itertools.product(points, repeat=3)
        if sum(sizes) <= 150
    )
    total = sum(weight[name] * falls[name] ** size for name, size in found.items())
    assert total == pytest.approx(best)


def test_a_step_that_buys_nothing_is_not_paid_for_unless_more_follows() -> None:
    curves = {"flat": Curve([10, 20, 30], [0.5, 0.5, 0.5]), "late": Curve([10, 20, 30], [0.5, 0.5, 0.1])}
    assert share(curves, 100) == {"flat": 10, "late": 30}
    assert share(curves, 30) == {"flat": 10, "late": 20}
    with pytest.raises(ValueError, match="more than the budget"):
        share(curves, 19)
