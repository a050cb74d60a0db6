"""Pairs of widths for V and U: the best ones, with a proof, as SCIP finds them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prinmix.compress.allocation import active, knapsack
from vllm_prinmix.compress.allocation.allocate import Allocation
from vllm_prinmix.compress.allocation.pairs import APART, Pair, choose_pairs
from vllm_prinmix.kernels.packing import DIRECTION_BYTES, row_bytes

BITS = (1, 2, 3, 4, 5, 6, 8)
# Relative errors of normal numbers on a good grid of so many levels.
DISTORTION = dict(zip(BITS, (0.36, 0.119, 0.037, 0.0115, 0.0035, 0.001, 6.7e-5), strict=True))
Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


def tables(n: int, decay: float, seed: int = 0, bits: tuple[int, ...] = BITS) -> Tables:
    """Errors of V and U, and of dropped directions, with the spectrum of an LLM's delta."""
    random = np.random.default_rng(seed)
    energy = (1 + np.arange(n) / 4) ** (-2 * decay)
    scale = energy[:, None] * np.array([DISTORTION[b] for b in bits])
    v, u = (scale * random.lognormal(0, 0.2, scale.shape) for _ in range(2))
    return v, u, energy


def cost(pair: Pair | None, rows: int, cols: int) -> int:
    return row_bytes(pair.v, cols) + row_bytes(pair.u, rows) + DIRECTION_BYTES if pair else 0


def error(pairs: list[Pair | None], found: Tables, bits: tuple[int, ...]) -> float:
    v, u, dropped = found
    return sum(
        v[i, bits.index(p.v)] + u[i, bits.index(p.u)] if p else dropped[i] for i, p in enumerate(pairs)
    )


def assert_valid(
    pairs: list[Pair | None], found: Allocation, table: Tables, limit: int, classes: int, size: int = 128
) -> None:
    kept = [p for p in pairs if p is not None]
    assert len(pairs) == len(table[2])
    assert len(set(kept)) <= classes
    assert all(abs(p.v - p.u) <= APART for p in kept)
    assert sum(cost(p, size, size) for p in kept) <= limit
    assert found.error == pytest.approx(error(pairs, table, BITS), rel=1e-12)
    assert found.bound <= found.objective


def test_pairs_are_the_best_ones() -> None:
    """Against all choices, with room for every pair of widths."""
    random = np.random.default_rng(0)
    bits, n, rows, cols = (1, 2, 3), 4, 128, 256
    v, u = (np.sort(random.random((n, 3)), axis=1)[:, ::-1] for _ in range(2))
    dropped = 3 + random.random(n)
    limit = 700
    pairs, found = choose_pairs(v, u, dropped, bits, rows, cols, limit, max_classes=9)
    options = [None, *(Pair(a, b) for a in bits for b in bits)]
    choices = [
        list(choice)
        for choice in itertools.product(options, repeat=n)
        if sum(cost(pair, rows, cols) for pair in choice) <= limit
    ]
    best = min(error(choice, (v, u, dropped), bits) for choice in choices)
    assert sum(cost(pair, rows, cols) for pair in pairs) <= limit
    assert error(pairs, (v, u, dropped), bits) == pytest.approx(best)
    assert found.error == pytest.approx(best)
    assert found.bound == pytest.approx(best)


@settings(deadline=None, max_examples=60)
@given(
    # Small integers: many ties.
    v=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=4, max_size=4),
    u=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=4, max_size=4),
    dropped=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    limit=st.integers(0, 600),
    classes=st.integers(1, 4),
)
def test_few_classes_are_the_best_ones(v: list, u: list, dropped: list, limit: int, classes: int) -> None:
    bits = (1, 2, 4)
    table = np.array(v, dtype=float), np.array(u, dtype=float), np.array(dropped, dtype=float)
    pairs, found = choose_pairs(*table, bits, 128, 128, limit, classes)
    options = [None, *(Pair(a, b) for a in bits for b in bits if abs(a - b) <= APART)]
    best = min(
        error(list(choice), table, bits)
        for choice in itertools.product(options, repeat=4)
        if sum(cost(pair, 128, 128) for pair in choice) <= limit and len(set(choice) - {None}) <= classes
    )
    assert error(pairs, table, bits) == pytest.approx(best, abs=1e-12)
    assert len(set(pairs) - {None}) <= classes
    assert sum(cost(pair, 128, 128) for pair in pairs) <= limit
    assert found.gap == 0


@pytest.mark.parametrize("classes", [1, 3, 6])
@pytest.mark.parametrize(("n", "decay", "limit"), [(24, 0.6, 900), (24, 1.0, 1700), (16, 0.35, 1200)])
def test_the_same_optimum_as_scip(n: int, decay: float, limit: int, classes: int) -> None:
    """Of the whole problem: every pair may be used, at most ``classes`` of them are."""
    table = tables(n, decay)
    pairs, ours = choose_pairs(*table, BITS, 128, 128, limit, classes)
    _, scip = choose_pairs(*table, BITS, 128, 128, limit, classes, solver="scip")
    assert_valid(pairs, ours, table, limit, classes)
    assert ours.error == pytest.approx(scip.error, rel=1e-6)
    assert ours.bound <= scip.error * (1 + 1e-9)
    assert ours.gap == scip.gap == 0


@pytest.mark.parametrize("limited", ["MAX_NODES", "MAX_STATES"])
def test_without_time_for_a_proof_the_bound_is_below_the_optimum(
    limited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tables(200, 0.6)
    _, best = choose_pairs(*table, BITS, 128, 128, 12_000, 4)
    monkeypatch.setattr(active if limited == "MAX_NODES" else knapsack, limited, 3)
    pairs, rough = choose_pairs(*table, BITS, 128, 128, 12_000, 4)
    assert_valid(pairs, rough, table, 12_000, 4)
    assert best.gap == 0 < rough.gap < 0.1
    assert rough.bound < best.error <= rough.error


@pytest.mark.parametrize("decay", [0.35, 0.6, 1.0])
def test_large_tables_are_proved(decay: float) -> None:
    table = tables(1200, decay)
    pairs, found = choose_pairs(*table, BITS, 1280, 1280, 1280 * 1280 // 8, 6)
    assert_valid(pairs, found, table, 1280 * 1280 // 8, 6, size=1280)
    assert found.gap == 0


def test_classes_are_worth_something_and_fewer_of_them_cost() -> None:
    table = tables(150, 0.6)
    errors = [choose_pairs(*table, BITS, 128, 128, 9_000, k)[1].error for k in (1, 2, 3, 4, 5, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.02 * errors[-1]


@pytest.mark.parametrize("bits", [(1,), (2, 3, 4), (1, 8), (4, 5, 6, 8)], ids=str)
def test_subsets_of_widths(bits: tuple[int, ...]) -> None:
    table = tables(100, 0.8, bits=bits)
    for separate in (True, False):
        pairs, found = choose_pairs(*table, bits, 128, 128, 6_000, 6, separate)
        kept = {pair for pair in pairs if pair is not None}
        assert found.gap == 0
        assert {w for pair in kept for w in (pair.v, pair.u)} <= set(bits)
        assert all(pair.v == pair.u for pair in kept) or separate
        assert sum(cost(pair, 128, 128) for pair in pairs) <= 6_000


def test_a_rank_penalty_saves_directions_and_keeps_its_promise() -> None:
    """A share x of the directions is saved for at most rank_penalty * x more error."""
    table = tables(400, 0.6)
    limit = 30_000
    plain_pairs, plain = choose_pairs(*table, BITS, 128, 128, limit, 6)
    directions = len([pair for pair in plain_pairs if pair])
    before = directions
    for penalty in (0.05, 0.2, 0.5, 1.0, 3.0):
        pairs, found = choose_pairs(*table, BITS, 128, 128, limit, 6, rank_penalty=penalty)
        assert_valid(pairs, found, table, limit, 6)
        kept = len([pair for pair in pairs if pair])
        assert kept <= before
        assert plain.error <= found.error <= plain.error * (1 + penalty * (1 - kept / directions) + 1e-9)
        before = kept
    assert before < 0.8 * directions
