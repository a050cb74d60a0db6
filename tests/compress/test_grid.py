from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid, quantize, symmetric_grid


def bits_of(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_is_off_by_half_a_step_at_most(bits: int) -> None:
    vectors = torch.randn(20, 300, generator=torch.Generator().manual_seed(bits))
    grid = minmax_grid(vectors, bits_of(bits).expand(20))
    codes = quantize(vectors, grid)
    assert codes.max() == 2**bits - 1
    assert codes.min() == 0
    # The zero point's float16 rounding, at most 1/16 of a step, clips the ends by that much.
    assert ((dequantize(codes, grid) - vectors).abs() / grid.scale[:, None]).max() <= 0.5 + 1 / 16


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_extremes_are_on_the_grid_up_to_the_zero_points_rounding(bits: int) -> None:
    vectors = torch.randn(20, 300, generator=torch.Generator().manual_seed(bits))
    grid = minmax_grid(vectors, bits_of(bits).expand(20))
    decoded = dequantize(quantize(vectors, grid), grid)
    for extreme in (torch.amin, torch.amax):
        difference = (extreme(decoded, 1) - extreme(vectors, 1)).abs() / grid.scale
        assert difference.max() < 2**bits * 2**-11


@pytest.mark.parametrize("value", [0.0, 0.3, -7.5, 1e-30, -1e-42], ids="{:g}".format)
def test_constant_vectors_are_exact(value: float) -> None:
    vectors = torch.full((1, 5), value)
    grid = minmax_grid(vectors, bits_of(3))
    decoded = dequantize(quantize(vectors, grid), grid)
    tiny = torch.finfo(torch.float32).tiny  # below it, zero is near enough
    assert torch.allclose(decoded, vectors, rtol=1e-6, atol=float(tiny))


def test_each_row_has_its_own_width() -> None:
    vectors = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = minmax_grid(vectors, bits_of(2, 8, 3))
    for row, bits in enumerate((2, 8, 3)):
        alone = minmax_grid(vectors[row : row + 1], bits_of(bits))
        assert torch.equal(quantize(vectors, together)[row], quantize(vectors[row : row + 1], alone)[0])


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), min_size=1, max_size=20),
    bits=st.integers(1, 8),
)
def test_any_vector_has_a_finite_grid(values: list[float], bits: int) -> None:
    vectors = torch.tensor([values])
    grid = minmax_grid(vectors, bits_of(bits))
    assert 0 <= float(grid.zero) <= 2**bits - 1
    decoded = dequantize(quantize(vectors, grid), grid)
    assert ((decoded - vectors).abs() <= 0.57 * grid.scale).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_symmetric_grid_has_a_level_at_zero(bits: int) -> None:
    vectors = torch.randn(20, 300, generator=torch.Generator().manual_seed(bits))
    vectors[0] = 0
    grid = symmetric_grid(vectors, bits_of(bits).expand(20))
    assert (grid.zero == 2 ** (bits - 1)).all()
    spread = 2 * vectors.abs().amax(1) / (2**bits - 1)
    assert torch.allclose(grid.scale[1:], spread[1:])
    assert grid.scale[0] == 1
    decoded = dequantize(quantize(vectors, grid), grid)
    assert not decoded[0].any()
    assert not decoded[vectors.abs() < 0.49 * grid.scale[:, None]].any()
