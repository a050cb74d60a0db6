"""Stacked simulation: the same as one GPTQ call per width and grid."""

from __future__ import annotations

import torch

from tests.compress.layers import make_layer
from vllm_prinmix.compress.quantization import best_grid
from vllm_prinmix.compress.quantization.best_grid import quantize_best, simulate
from vllm_prinmix.compress.quantization.gptq import gptq, gptq_with_errors
from vllm_prinmix.compress.quantization.grid import CLIPPED_GRIDS, clipped_grids, dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.whiten import whitened_svd

WIDTHS = (1, 2, 4)


def metric(size: int = 96) -> Hessian:
    return Hessian(make_layer(8, size, outliers=2).calibration)


def vectors(n: int = 12, size: int = 96) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(1))


def test_the_best_of_all_grids_is_taken_whatever_the_stacking(monkeypatch) -> None:
    hessian, weight = metric(), vectors()
    bits = torch.tensor([1, 2, 3, 4] * 3, dtype=torch.uint8)
    grids = clipped_grids(weight, bits)
    assert len(grids) == CLIPPED_GRIDS
    alone = torch.stack([gptq_with_errors(weight, hessian, grid)[1] for grid in grids])
    codes, grid, errors = quantize_best(weight, hessian, bits)
    assert torch.allclose(errors, alone.min(dim=0).values, rtol=1e-5)
    assert len(alone.argmin(dim=0).unique()) > 1, "one grid is the best for all: nothing was shown"
    assert torch.equal(codes, gptq(weight, hessian, grid))
    monkeypatch.setattr(best_grid, "STACKED_ENTRIES", 5 * 96 * CLIPPED_GRIDS)
    assert torch.equal(codes, quantize_best(weight, hessian, bits)[0])


def test_the_errors_are_those_of_the_codes() -> None:
    """In the damped metric, for grids per row and per column, and a diagonal metric."""
    weight = vectors(96, 96)
    bits = torch.full((96,), 3, dtype=torch.uint8)
    for hessian in (metric(), Hessian(torch.rand(96) + 0.1)):
        damped = 0.0 if hessian.is_diagonal else float(hessian.damping)
        for per_column in (False, True):
            grid = minmax_grid(weight.T.contiguous() if per_column else weight, bits)
            codes, errors = gptq_with_errors(weight, hessian, grid, per_column=per_column)
            if per_column:
                wrong = weight - dequantize(codes.T.contiguous(), grid).T
            else:
                wrong = weight - dequantize(codes, grid)
            expected = hessian.norm(wrong) + damped * wrong.double().square().sum(1)
            assert torch.allclose(errors, expected, rtol=1e-3)


def test_simulation_of_all_rows_is_what_each_width_costs() -> None:
    hessian, weight = metric(), vectors()
    shares = simulate(weight, hessian, WIDTHS, sampled=0)
    for column, width in enumerate(WIDTHS):
        bits = torch.full((len(weight),), width, dtype=torch.uint8)
        _, _, errors = quantize_best(weight, hessian, bits)
        assert torch.allclose(shares[:, column], errors / hessian.damped_norm(weight))


def test_sampled_simulation_follows_the_trend() -> None:
    layer = make_layer(200, 160, outliers=2)
    hessian = Hessian(layer.calibration)
    _, _, v = whitened_svd(layer.dw, hessian)
    every, some = (simulate(v, hessian, WIDTHS, sampled=sampled) for sampled in (0, 40))
    assert some.shape == every.shape
    off = some.log() - every.log()
    assert off.mean().abs() < 0.1
    assert off.abs().mean() < 0.5  # single vectors scatter by a factor of two around it
    assert simulate(v[:0], hessian, WIDTHS).shape == (0, 3)
