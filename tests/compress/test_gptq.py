from __future__ import annotations

import pytest
import torch

from tests.compress.layers import make_layer
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import Grid, dequantize, minmax_grid, quantize
from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian
from vllm_prinmix.errors import PrinMixError


def widths(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.uint8)


def rows_of(layer_seed: int, n: int, size: int) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(layer_seed))


def reference(weight: torch.Tensor, matrix: torch.Tensor, grid: Grid) -> torch.Tensor:
    """GPTQ as published, column by column through the inverse of H, in float64; one grid per row."""
    order = torch.argsort(matrix.diagonal(), stable=True).flip(0)
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix))
    inverse = torch.linalg.inv(damped[order][:, order].double())
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.double()[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for k in range(len(matrix)):
        codes[:, k] = quantize(weight[:, k : k + 1].float(), grid)[:, 0]
        error = weight[:, k] - dequantize(codes[:, k : k + 1], grid)[:, 0]
        weight[:, k:] -= torch.outer(error / upper[k, k], upper[k, k:])
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


@pytest.mark.parametrize("size", [1, 5, 16, 100, 300])
def test_equals_the_published_recursion(size: int) -> None:
    matrix = make_layer(size, size, outliers=min(3, size - 1)).calibration
    weight = rows_of(1, 12, size)
    grid = minmax_grid(weight, widths(2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 8))
    codes, expected = gptq(weight, Hessian(matrix), grid), reference(weight, matrix, grid)
    # A sum on the edge between two codes may round either way, and what follows it then differs: few rows.
    assert (codes != expected).any(dim=1).sum() <= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_to_nearest_in_the_metric(bits: int) -> None:
    hessian = Hessian(make_layer(96, 96, outliers=3).calibration)
    weight = rows_of(2, 40, 96)
    grid = minmax_grid(weight, widths(bits).expand(40))
    solved = hessian.norm(weight - dequantize(gptq(weight, hessian, grid), grid)).sum()
    nearest = hessian.norm(weight - dequantize(quantize(weight, grid), grid)).sum()
    assert solved < 0.5 * nearest


def test_all_widths_stacked_equal_separate_runs_bit_for_bit() -> None:
    hessian = Hessian(make_layer(160, 160, outliers=3).calibration)
    weight = rows_of(3, 50, 160)
    candidates = (2, 3, 4, 5, 6, 7, 8)
    stacked = weight.repeat(len(candidates), 1)
    bits = widths(*candidates).repeat_interleave(50)
    together = gptq(stacked, hessian, minmax_grid(stacked, bits)).split(50)
    for width, codes in zip(candidates, together, strict=True):
        alone = gptq(weight, hessian, minmax_grid(weight, widths(width).expand(50)))
        assert torch.equal(codes, alone)


def test_column_grids_equal_row_grids_where_all_are_the_same() -> None:
    hessian = Hessian(make_layer(40, 40).calibration)
    weight = rows_of(4, 40, 40)
    grid = Grid(torch.full((40,), 0.3), torch.full((40,), 6.5, dtype=torch.float16), widths(4).expand(40))
    assert torch.equal(gptq(weight, hessian, grid), gptq(weight, hessian, grid, per_column=True))


def test_column_grids_keep_each_column_within_its_width() -> None:
    hessian = Hessian(make_layer(24, 24).calibration)
    weight = rows_of(5, 60, 24)
    bits = widths(2, 3, 8).repeat(8)
    codes = gptq(weight, hessian, minmax_grid(weight.T, bits), per_column=True)
    assert (codes.amax(dim=0).int() < 2 ** bits.int()).all()
    assert codes[:, bits == 8].max() > 7


def test_a_diagonal_metric_rounds_to_nearest() -> None:
    weight = rows_of(6, 8, 70)
    counts = torch.arange(70).float()
    grid = minmax_grid(weight, widths(3).expand(8))
    nearest = quantize(weight, grid)
    assert torch.equal(gptq(weight, Hessian(counts), grid), nearest)
    assert torch.equal(gptq(weight, Hessian(counts.diag()), grid), nearest)


def test_inputs_never_seen_are_rounded_to_nearest() -> None:
    matrix = make_layer(30, 30).calibration
    dead = torch.tensor([0, 7, 29])
    matrix[dead] = 0
    matrix[:, dead] = 0
    weight = rows_of(7, 9, 30)
    grid = minmax_grid(weight, widths(3).expand(9))
    assert torch.equal(gptq(weight, Hessian(matrix), grid)[:, dead], quantize(weight, grid)[:, dead])


def test_fewer_tokens_than_inputs() -> None:
    hessian = Hessian(make_layer(64, 64, tokens=10).calibration)
    weight = rows_of(8, 20, 64)
    grid = minmax_grid(weight, widths(3).expand(20))
    solved = hessian.norm(weight - dequantize(gptq(weight, hessian, grid), grid)).sum()
    assert solved < 0.2 * hessian.norm(weight - dequantize(quantize(weight, grid), grid)).sum()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_an_error(bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = bad
    with pytest.raises(PrinMixError, match="NaN or infinite"):
        gptq(weight, Hessian(torch.eye(4)), minmax_grid(torch.ones(2, 4), widths(2, 2)))


def test_another_width_than_the_metric_is_an_error() -> None:
    with pytest.raises(PrinMixError, match="differ in width"):
        gptq(torch.ones(2, 4), Hessian(torch.eye(5)), minmax_grid(torch.ones(2, 4), widths(2, 2)))
