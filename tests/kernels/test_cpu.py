"""The CPU path against the reference in float64, on the same inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.deltas import pack, random_factors, random_matrix, relative_error
from vllm_prinmix.kernels import cpu, reference
from vllm_prinmix.kernels.packed import PackedFactors

TOLERANCE = 5e-6

WIDTHS = [(1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (2, 3, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8)]
SHAPES = [(256, 256), (768, 256), (256, 704), (300, 200), (1, 130), (129, 1)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_linear(shape: tuple[int, int], widths: tuple[int, ...]) -> None:
    delta = random_factors(*shape, directions=37, widths=widths, seed=0, row_scale=len(widths) > 1)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    assert relative_error(cpu.linear(x, pack(delta)), reference.linear(x, delta)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("directions", [1, 15, 16, 17, 200])
def test_linear_over_tokens_and_directions(tokens: int, directions: int) -> None:
    delta = random_factors(200, 256, directions, (2, 3, 4), seed=2)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(3))
    assert relative_error(cpu.linear(x, pack(delta)), reference.linear(x, delta)) < TOLERANCE


def test_no_directions_add_nothing() -> None:
    delta = random_factors(40, 30, 0, (2,), seed=0)
    assert torch.equal(cpu.linear(torch.ones(3, 30), pack(delta)), torch.zeros(3, 40))
    assert torch.equal(cpu.embedding(torch.tensor([1, 2]), pack(delta)), torch.zeros(2, 30))


@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_embedding(widths: tuple[int, ...], row_scale: bool) -> None:
    delta = random_factors(321, 96, 40, widths, seed=4, row_scale=row_scale)
    ids = torch.tensor([0, 320, 5, 5, 127, 128, 255, 256])
    assert relative_error(cpu.embedding(ids, pack(delta)), reference.embedding(ids, delta)) < TOLERANCE


@pytest.mark.parametrize("bits", range(1, 9))
def test_matrix_without_svd(bits: int) -> None:
    delta = random_matrix(50, 200, bits, seed=5)
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(6))
    ids = torch.tensor([0, 49, 17])
    assert relative_error(cpu.linear(x, pack(delta)), reference.linear(x, delta)) < TOLERANCE
    assert relative_error(cpu.embedding(ids, pack(delta)), reference.embedding(ids, delta)) < TOLERANCE
    part = pack(delta).slice_rows(7, 33)
    assert relative_error(cpu.linear(x, part), reference.linear(x, delta)[:, 7:33]) < TOLERANCE


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(2, 400),
    cols=st.integers(2, 400),
    directions=st.integers(1, 40),
    cut=st.tuples(st.floats(0, 0.49), st.floats(0.5, 1)),
    seed=st.integers(0, 1000),
)
def test_slices_for_tensor_parallelism(
    rows: int, cols: int, directions: int, cut: tuple[float, float], seed: int
) -> None:
    """Row slices side by side, and column slices summed, are the whole product."""
    delta = random_factors(rows, cols, directions, (1, 2, 3, 5), seed, row_scale=True)
    packed = pack(delta)
    assert isinstance(packed, PackedFactors)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(seed))
    whole = reference.linear(x, delta)
    at = max(int(cut[1] * rows), 1)
    parts = [cpu.linear(x, packed.slice_rows(a, b)) for a, b in ((0, at), (at, rows)) if a < b]
    assert (torch.cat(parts, dim=1) - whole).norm() <= TOLERANCE * whole.norm() + 1e-6
    at = max(int(cut[0] * cols), 1)
    total = cpu.linear(x[:, :at], packed.slice_cols(0, at))
    total = total + cpu.linear(x[:, at:], packed.slice_cols(at, cols))
    # Both halves may be much larger than their sum, so the bound is on the larger of the two.
    assert (total - whole).norm() <= 20 * TOLERANCE * max(whole.norm(), total.norm()) + 1e-4


def test_a_slice_holds_only_its_share_of_the_bytes() -> None:
    packed = pack(random_factors(1024, 512, 64, (2, 3), seed=7))
    assert isinstance(packed, PackedFactors)
    u_bytes = sum(c.u.nbytes for c in packed.classes)
    assert sum(c.u.nbytes for c in packed.slice_rows(0, 256).classes) == u_bytes // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    x, weight = torch.randn(6, 4, 64, generator=generator).to(dtype), torch.randn(64, generator=generator)
    expected = reference.rms_norm(x, weight.to(dtype), 1e-6)
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(cpu.rms_norm(x, weight, 1e-6), expected) < bound
