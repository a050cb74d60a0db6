"""The compiled CPU kernels against the reference in float64, on the same inputs."""

import platform

import numpy as np
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


@pytest.fixture(params=["this machine", "without AVX-512"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as they are compiled here, and as they would be where they cannot look up sums."""
    if request.param == "without AVX-512":
        if platform.machine() != "x86_64":
            pytest.skip("no AVX-512 to leave out")
        library = native.library("-mno-avx512f")
        monkeypatch.setattr(native, "library", lambda: library)
    assert native.library() is not None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("widths", [*((bits,) for bits in range(1, 9)), tuple(range(1, 9))], ids=str)
@pytest.mark.parametrize("tokens", [*range(1, 21), 40])
def test_all_widths_and_token_counts(widths: tuple[int, ...], tokens: int) -> None:
    delta, packed = packed_factors(300, 200, 37, widths, seed=0, row_scale=len(widths) > 1)
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(1))
    found = native.linear(x, [(native.SiteFactors([(packed, 0)]), tokens)], 300)
    assert relative_error(found, reference.linear(x, delta)) < TOLERANCE


BOUNDS = {torch.float32: TOLERANCE, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("x_type", BOUNDS, ids=str)
@pytest.mark.parametrize("y_type", BOUNDS, ids=str)
def test_added_in_place(x_type: torch.dtype, y_type: torch.dtype) -> None:
    """x and y are windows of larger tensors, rows unordered, a slot without factors, a slice without one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 300, generator=generator).to(x_type)[:, 40:240]
    y = torch.randn(9, 400, generator=generator).to(y_type)[:, 30:340]
    delta, packed = packed_factors(130, 200, 37, (1, 2, 3, 4, 7), seed=2, row_scale=True)
    other, other_packed = packed_factors(300, 200, 21, (2, 3), seed=3)
    bias = torch.randn(310, generator=generator)
    first = native.SiteFactors([(packed, 0), (170, 130)], bias)
    second = native.SiteFactors([(other_packed, 5)])
    table = native.Table(3)
    table[0], table[2] = first.address, second.address
    expected = y.double()
    rows, others = [7, 2, 3], [8, 0]
    expected[rows, :130] += reference.linear(x[rows], delta)
    expected[rows, :300] += bias[:300]
    expected[others, 5:305] += reference.linear(x[others], other)
    found, around = y.clone(), y
    native.linear_(
        found, x, table, native.Rows([(0, np.array(rows)), (1, np.array([1])), (2, np.array(others))])
    )
    changed = rows + others
    untouched = [row for row in range(9) if row not in changed]
    assert torch.equal(found[untouched], around[untouched])
    assert torch.equal(found[rows][:, 300:], around[rows][:, 300:])
    assert torch.equal(found[others][:, 305:], around[others][:, 305:])
    assert relative_error(found[changed], expected[changed]) < BOUNDS[y_type]


def test_a_window_of_y_stays_inside_itself() -> None:
    _, packed = packed_factors(130, 200, 37, (2,), seed=2)
    whole = torch.zeros(3, 400)
    table, factors = native.Table(1), native.SiteFactors([(packed, 0)])
    table[0] = factors.address
    native.linear_(whole[:, 30:160], torch.ones(3, 200), table, native.Rows([(0, np.array([2, 0]))]))
    assert whole[0, 30:160].all()
    whole[[0, 2], 30:160] = 0
    assert not whole.any()


@pytest.mark.usefixtures("kernels")
def test_the_number_of_threads_changes_nothing() -> None:
    _, packed = packed_factors(1000, 900, 300, (2, 3, 4), seed=0)
    groups = [(native.SiteFactors([(packed, 0)]), 1), (native.SiteFactors([(packed, 0)]), 18)]
    x = torch.randn(19, 900, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.linear(x, groups, 1000))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_types_of_activations(dtype: torch.dtype) -> None:
    """Every number of 16 bits is read as torch reads it, and sums are rounded as torch rounds them."""
    _, packed = packed_factors(1 << 10, 1, 0, (2,), seed=0)
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    y = numbers.view(dtype) if dtype != torch.float32 else numbers.float()
    y = y.reshape(64, 1 << 10).clone()
    bias = torch.randn(1 << 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 4, 1 << 10)
    table, factors = native.Table(1), native.SiteFactors([(packed, 0)], bias)
    table[0] = factors.address
    limit = torch.finfo(dtype).max
    expected = torch.nan_to_num(y.float() + bias, nan=0.0).clamp(-limit, limit).to(dtype)
    native.linear_(y, torch.zeros(64, 1, dtype=dtype), table, native.Rows([(0, np.arange(64))]))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("x_type", BOUNDS, ids=str)
@pytest.mark.parametrize("y_type", BOUNDS, ids=str)
@pytest.mark.parametrize("size", [16, 100, 896])
def test_norm(x_type: torch.dtype, y_type: torch.dtype, size: int) -> None:
    """A norm over heads that lie inside wider rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5 * size, generator=generator).to(x_type)[:, size : 4 * size].unflatten(1, (3, size))
    y, weight = torch.zeros(6, 3, size, dtype=y_type), torch.randn(size, generator=generator)
    table = native.Table(2)
    table[1] = weight.data_ptr()
    native.norm_(y, x, table, native.Rows([(0, np.array([1])), (1, np.array([4, 0]))]), 1e-6)
    assert relative_error(y[[4, 0]], reference.rms_norm(x[[4, 0]], weight, 1e-6)) < BOUNDS[y_type]
    assert not y[[1, 2, 3, 5]].any()


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
@pytest.mark.usefixtures("kernels")
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
