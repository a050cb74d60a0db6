"""The compiled CPU kernels against the reference in float64, on the same inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.deltas import pack, random_factors, relative_error
from vllm_prinmix.kernels import cpu, native, reference
from vllm_prinmix.kernels.packed import PackedFactors

TOLERANCE = 5e-6


def packed_factors(rows: int, cols: int, directions: int, widths: tuple[int, ...], seed: int, **more):
    delta = random_factors(rows, cols, directions, widths, seed, **more)
    packed = pack(delta)
    assert isinstance(packed, PackedFactors)
    return delta, packed


def test_they_compile_here() -> None:
    assert native.library() is not None


@pytest.mark.parametrize("widths", [*((bits,) for bits in range(1, 9)), tuple(range(1, 9))], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 40])
def test_all_widths_and_token_counts(widths: tuple[int, ...], tokens: int) -> None:
    delta, packed = packed_factors(300, 200, 37, widths, seed=0, row_scale=len(widths) > 1)
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(1))
    found = native.linear(x, [(native.SiteFactors([(packed, 0)]), tokens)], 300)
    assert relative_error(found, reference.linear(x, delta)) < TOLERANCE


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    slices=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    cols=st.integers(1, 400),
    directions=st.lists(st.integers(0, 70), min_size=18, max_size=18),
    seed=st.integers(0, 1000),
)
def test_tenants_share_a_call(
    tokens: list[int], slices: list[int], cols: int, directions: list[int], seed: int
) -> None:
    """Every tenant has directions of its own in every slice, and its own rows of x."""
    x = torch.randn(sum(tokens), cols, generator=torch.Generator().manual_seed(seed))
    groups, expected = [], []
    rows_of_x = x.split(tokens)
    for i, count in enumerate(tokens):
        pairs = [
            packed_factors(rows, cols, directions[3 * i + j], (1, 2, 3, 5), seed + 10 * i + j)
            for j, rows in enumerate(slices)
        ]
        starts = [sum(slices[:j]) for j in range(len(slices))]
        parts = [(packed, start) for (_, packed), start in zip(pairs, starts, strict=True)]
        groups.append((native.SiteFactors(parts), count))
        expected.append(torch.cat([reference.linear(rows_of_x[i], delta) for delta, _ in pairs], dim=1))
    found = native.linear(x, groups, sum(slices))
    for ours, theirs in zip(found.split(tokens), expected, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm() + 1e-6


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(2, 400),
    cols=st.integers(2, 400),
    cut=st.tuples(st.floats(0, 0.49), st.floats(0.5, 1)),
    seed=st.integers(0, 1000),
)
def test_slices_for_tensor_parallelism(rows: int, cols: int, cut: tuple[float, float], seed: int) -> None:
    """The same as the operators of torch on the same cut."""
    _, packed = packed_factors(rows, cols, 40, (1, 2, 3, 5), seed, row_scale=True)
    start, stop = int(cut[0] * rows), max(int(cut[1] * rows), int(cut[0] * rows) + 1)
    first, last = int(cut[0] * cols), max(int(cut[1] * cols), int(cut[0] * cols) + 1)
    part = packed.slice_rows(start, stop).slice_cols(first, last)
    x = torch.randn(3, last - first, generator=torch.Generator().manual_seed(seed))
    found = native.linear(x, [(native.SiteFactors([(part, 0)]), 3)], stop - start)
    expected = cpu.linear(x, part)
    assert (found - expected).norm() <= 20 * TOLERANCE * expected.norm() + 1e-5


@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_embedding(tokens: int, row_scale: bool) -> None:
    delta, packed = packed_factors(321, 96, 40, (1, 2, 3, 5, 8), seed=4, row_scale=row_scale)
    ids = torch.tensor([0, 320, 5, 127, 128])[:tokens]
    factors = native.SiteFactors([(packed, 0)], transposed=True)
    found = torch.zeros(tokens, 96)
    native.expand_(found, cpu.gather(ids, packed), factors, torch.arange(tokens))
    assert relative_error(found, reference.embedding(ids, delta)) < TOLERANCE


def test_without_a_compiler_there_is_a_warning(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be compiled, slower ones are used"):
        assert native.library.__wrapped__() is None


def test_a_library_is_built_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = native._build()
    assert built.parent == tmp_path / "vllm-prinmix"
    before = built.stat().st_mtime_ns
    assert native._build() == built
    assert built.stat().st_mtime_ns == before
