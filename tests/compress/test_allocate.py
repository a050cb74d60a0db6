from __future__ import annotations

import sys
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prinmix.compress.allocation import active, knapsack
from vllm_prinmix.compress.allocation.allocate import SOLVERS, allocate
from vllm_prinmix.errors import PrinMixError

BITS = (0, 2, 3, 4, 5, 6, 7, 8)


def brute_force(errors: np.ndarray, cost: list[int], budget: int, max_active: int) -> float | None:
    """The least error over every choice of Eq. 8, or None where there is none."""
    found = [
        sum(row[column] for row, column in zip(errors, choice, strict=True))
        for choice in product(range(len(cost)), repeat=len(errors))
        if len(set(choice)) <= max_active and sum(cost[column] for column in choice) <= budget
    ]
    return min(found, default=None)


def assert_valid(
    choice: np.ndarray, errors: np.ndarray, cost: list[int], budget: int, max_active: int
) -> None:
    assert choice.shape == (len(errors),)
    assert sum(cost[column] for column in choice) <= budget
    assert len(set(choice.tolist())) <= max_active


def realistic_table(n: int, decay: float, seed: int = 0) -> np.ndarray:
    """sigma^2 times a difference term that falls with the width and varies mildly by row."""
    random = np.random.default_rng(seed)
    scaling = (1 + np.arange(n) / 4) ** (-2 * decay)
    difference = np.array([1.0 if bits == 0 else 4.0 ** (1 - bits) for bits in BITS])
    return scaling[:, None] * difference * random.lognormal(0, 0.2, (n, len(BITS)))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(solver: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    errors = random.random((5, 5)) * random.random((5, 1)) ** 3
    cost = [0, 20, 28, 36, 60]
    for budget, max_active in [(90, 2), (90, 3), (150, 4), (19, 4), (0, 1), (10_000, 1)]:
        allocation = allocate(errors, cost, budget, max_active, solver)
        assert_valid(allocation.choice, errors, cost, budget, max_active)
        assert allocation.error == pytest.approx(brute_force(errors, cost, budget, max_active), rel=1e-9)
        assert allocation.gap == 0


@settings(deadline=None, max_examples=150)
@given(
    # Small integers: many ties, on which bounds and dominance go wrong first.
    table=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5),
    cost=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    budget=st.integers(0, 60),
    max_active=st.integers(1, 5),
)
def test_exact_solver_equals_brute_force_on_any_table(
    table: list[list[int]], cost: list[int], budget: int, max_active: int
) -> None:
    errors = np.array(table, dtype=float)
    expected = brute_force(errors, cost, budget, max_active)
    if expected is None:
        with pytest.raises(PrinMixError, match="below the cheapest"):
            allocate(errors, cost, budget, max_active, "exact")
        return
    allocation = allocate(errors, cost, budget, max_active, "exact")
    assert_valid(allocation.choice, errors, cost, budget, max_active)
    assert allocation.error == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert allocation.gap == 0


def dynamic_program(errors: np.ndarray, cost: np.ndarray, budget: int, max_active: int) -> float:
    """The least error by a table over all budgets, subset by subset: for more rows than brute force."""
    best = np.inf
    for subset in combinations(range(len(cost)), max_active):
        least = np.zeros(budget + 1)  # by budget
        for row in errors:
            before = np.concatenate((np.full(cost.max(), np.inf), least))
            least = np.min([before[cost.max() - cost[k] :][: budget + 1] + row[k] for k in subset], axis=0)
        best = min(best, float(least[-1]))
    return best


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0], ids="spread{:g}".format)
@pytest.mark.parametrize("seed", range(12))
def test_exact_solver_equals_dynamic_programming(spread: float, seed: int) -> None:
    """Uneven costs and errors that hardly depend on the row, so that the bound alone settles little."""
    random = np.random.default_rng(seed)
    cost = np.sort(random.choice(np.arange(1, 40), 5, replace=False))
    errors = np.exp(-cost / 9) * random.lognormal(0, 0.3, (25, 5)) * random.lognormal(0, spread, (25, 1))
    budget = int(random.uniform(1.1, 0.8 * cost[-1] / cost[0]) * 25 * cost[0])
    choice, bound = active.solve(errors, cost, budget, 3) or (np.zeros(0), 0.0)
    assert_valid(choice, errors, cost.tolist(), budget, 3)
    error = errors[np.arange(25), choice].sum()
    assert error == pytest.approx(dynamic_program(errors, cost, budget, 3), rel=1e-12)
    assert bound == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize(("n", "decay", "share"), [(40, 0.6, 1 / 16), (64, 1.0, 1 / 8), (96, 2.5, 1 / 32)])
def test_both_solvers_reach_the_same_optimum(n: int, decay: float, share: float) -> None:
    errors, cost = realistic_table(n, decay), [64 * bits + 8 * (bits > 0) for bits in BITS]
    budget = int(share * n * 64 * 16)
    exact, scip = (allocate(errors, cost, budget, 4, solver) for solver in ("exact", "scip"))
    assert exact.error == pytest.approx(scip.error, rel=1e-9)
    assert exact.gap == scip.gap == 0
    assert len(set(exact.choice)) <= 4


def test_the_exact_solver_closes_the_gap_on_large_tables() -> None:
    errors, cost = realistic_table(1500, 0.6), [752 * bits + 8 * (bits > 0) for bits in BITS]
    allocation = allocate(errors, cost, 1500 * 752, 4, "exact")
    assert_valid(allocation.choice, errors, cost, 1500 * 752, 4)
    assert allocation.gap == 0


def test_the_gap_is_reported_where_it_was_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, cost = realistic_table(60, 0.6), [64 * bits + 8 * (bits > 0) for bits in BITS]
    best = allocate(errors, cost, 7_000, 4, "exact")
    monkeypatch.setattr(knapsack, "MAX_STATES", 0)
    rough = allocate(errors, cost, 7_000, 4, "exact")
    assert 0 < rough.gap < 0.05
    assert (1 - rough.gap) * rough.error <= best.error <= rough.error


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_narrower_choice_of_widths_costs_error(solver: str) -> None:
    errors, cost = realistic_table(24, 0.8), [64 * bits + 8 * (bits > 0) for bits in BITS]
    by_limit = [allocate(errors, cost, 3_000, limit, solver).error for limit in (1, 2, 4, 8)]
    assert by_limit == sorted(by_limit, reverse=True)
    assert by_limit[0] > by_limit[1] > by_limit[-1]
    assert by_limit[0] == pytest.approx(
        min(errors[:, [column]].sum() for column in range(8) if 24 * cost[column] <= 3_000)
    )


def test_subsets_are_tried_whole() -> None:
    """The best pair of widths is not a part of the best triple."""
    errors = np.array([[10.0, 4.0, 9.0, 0.0], [10.0, 9.0, 4.0, 0.0], [10.0, 4.0, 4.0, 0.0]])
    cost = [0, 10, 11, 40]
    for max_active, solver in product((2, 3), SOLVERS):
        found = allocate(errors, cost, 42, max_active, solver).error
        assert found == min(
            error
            for subset in combinations(range(4), max_active)
            if (error := brute_force(errors[:, subset], [cost[c] for c in subset], 42, 4)) is not None
        )


def test_bytes_that_buy_nothing_are_not_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = np.array([[0.0, 0.0, 0.0], [5.0, 1.0, 1.0], [2.0, 2.0, 0.5]])
    wasteful = np.array([2, 2, 2]), 1.5
    monkeypatch.setattr(active, "solve", lambda *_: wasteful)
    # Only widths that the solver uses are taken: another one would count against max_active.
    assert allocate(errors, [0, 10, 20], 1_000, 3, "exact").choice.tolist() == [2, 2, 2]
    monkeypatch.setattr(active, "solve", lambda *_: (np.array([0, 2, 1]), 3.0))
    assert allocate(errors, [0, 10, 20], 1_000, 3, "exact").choice.tolist() == [0, 1, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_rows(solver: str) -> None:
    assert allocate(np.empty((0, 3)), [0, 1, 2], 0, 4, solver).choice.shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_below_the_cheapest_choice_is_an_error(solver: str) -> None:
    with pytest.raises(PrinMixError, match=r"below the cheapest.*found: 29 bytes.*at least 30 bytes"):
        allocate(np.ones((3, 2)), [10, 20], 29, 4, solver)


@pytest.mark.parametrize(
    ("errors", "max_active", "solver", "message"),
    [
        (np.ones((2, 2)), 4, "simplex", "unknown solver"),
        (np.ones((2, 2)), 0, "exact", "without candidates"),
        (np.ones((2, 3)), 4, "exact", "without candidates"),
        (np.full((2, 2), np.nan), 4, "exact", "error table"),
        (-np.ones((2, 2)), 4, "exact", "error table"),
    ],
    ids=["solver", "no-widths", "costs", "nan", "negative"],
)
def test_bad_arguments_are_errors(errors: np.ndarray, max_active: int, solver: str, message: str) -> None:
    with pytest.raises(PrinMixError, match=message):
        allocate(errors, [0, 10], 100, max_active, solver)


def test_a_missing_solver_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyscipopt", None)
    with pytest.raises(PrinMixError, match=r"SCIP solver is not installed.*--solver exact"):
        allocate(np.ones((2, 2)), [0, 10], 100, 4, "scip")
