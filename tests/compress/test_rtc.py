from __future__ import annotations

import pytest
import torch

from tests.compress.layers import Layer, make_layer, relative_error
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.rtc import correct_target, normal_equations
from vllm_prinmix.compress.quantization.svd import thin_svd


def quantized_v(layer: Layer, directions: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, Hessian]:
    """U and S V^ of the leading directions, and the metric."""
    hessian = Hessian(layer.calibration)
    u, sigma, v = (part[..., :directions] for part in (*thin_svd(layer.dw)[:2], thin_svd(layer.dw)[2].T))
    grid = minmax_grid(v.T, torch.full((directions,), bits, dtype=torch.uint8))
    return u, sigma[:, None] * dequantize(gptq(v.T, hessian, grid), grid), hessian


@pytest.mark.parametrize(("rows", "cols", "directions"), [(80, 60, 10), (60, 80, 40), (1, 50, 1)])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [20, 2048])
def test_never_worse_on_the_calibration_data(
    rows: int, cols: int, directions: int, bits: int, tokens: int
) -> None:
    layer = make_layer(rows, cols, tokens=tokens, outliers=2)
    u, sv, hessian = quantized_v(layer, directions, bits)
    corrected, _ = correct_target(layer.dw, u, sv, hessian)
    before = relative_error(layer.dw, u @ sv, layer.calibration)
    assert relative_error(layer.dw, corrected @ sv, layer.calibration) <= before * (1 + 1e-6)


def test_gains_where_directions_were_dropped() -> None:
    layer = make_layer(80, 80, outliers=2)
    u, sv, hessian = quantized_v(layer, 10, 2)
    corrected, _ = correct_target(layer.dw, u, sv, hessian)
    for metric in (layer.calibration, layer.heldout):
        assert relative_error(layer.dw, corrected @ sv, metric) < 0.8 * relative_error(
            layer.dw, u @ sv, metric
        )


def test_equals_equation_7_without_damping() -> None:
    layer = make_layer(30, 40)
    u, sv, hessian = quantized_v(layer, 12, 3)
    corrected, metric = correct_target(layer.dw, u, sv, hessian, damping=1e-9)
    wide = sv.double() @ layer.calibration.double()
    assert torch.allclose(metric.double(), wide @ sv.double().T, rtol=1e-4, atol=1e-3)
    expected = layer.dw.double() @ wide.T @ torch.linalg.inv(wide @ sv.double().T)
    assert torch.allclose(corrected.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_direction_without_weight_on_the_calibration_data_stays() -> None:
    layer = make_layer(20, 20)
    layer.calibration[-1] = layer.calibration[:, -1] = 0
    u, _, _ = thin_svd(layer.dw)
    sv = torch.eye(20)[[0, 19]]
    corrected, _ = correct_target(layer.dw, u[:, :2], sv, Hessian(layer.calibration))
    assert torch.equal(corrected[:, 1], u[:, 1])
    assert not torch.equal(corrected[:, 0], u[:, 0])


def test_rounding_leaves_no_negative_diagonal() -> None:
    """Directions that see nothing of inputs that are all alike."""
    x = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.5
    hessian = Hessian(torch.outer(x, x))
    sv = torch.randn(200, 60, generator=torch.Generator().manual_seed(1))
    sv -= torch.outer(sv @ x, x) / (x @ x)
    assert (sv @ hessian.times(sv).T).diagonal().min() < 0
    _, metric = normal_equations(torch.ones(3, 60), sv, hessian)
    assert metric.diagonal().min() == 0
