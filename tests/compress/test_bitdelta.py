"""`bitdelta`: signs and one scale."""

import pytest
import torch

from tests.compress.layers import make_layer, relative_error
from vllm_prinmix.compress.methods.bitdelta import BitDelta, fitted_scale
from vllm_prinmix.compress.quantization.hessian import Hessian


def test_signs_and_the_mean_magnitude() -> None:
    dw = torch.tensor([[0.5, -0.25, 0.0], [-1.0, 0.0, 0.25]])
    quantized, _ = BitDelta().compress(dw, Hessian(torch.eye(3)), None)
    alpha = 2 / 6
    expected = alpha * torch.tensor([[1.0, -1, 1], [-1, 1, 1]])
    assert torch.allclose(quantized.dense(), expected)
    assert (quantized.bits, quantized.codes.tolist()) == (1, [[1, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("diagonal", [False, True], ids=["dense", "diagonal"])
def test_the_fitted_scale_is_the_best_one(diagonal: bool) -> None:
    layer = make_layer(40, 60, outliers=2)
    metric = layer.calibration.diagonal() if diagonal else layer.calibration
    full = metric.diag() if diagonal else metric
    signs = torch.where(layer.dw >= 0, 1.0, -1.0)
    best = float(fitted_scale(layer.dw, Hessian(metric)))
    errors = [relative_error(layer.dw, best * factor * signs, full) for factor in (0.98, 1, 1.02)]
    assert min(errors) == errors[1]
    quantized, report = BitDelta(scale="fitted").compress(layer.dw, Hessian(metric), None)
    assert torch.allclose(quantized.dense(), best * signs)
    assert report["error"] == pytest.approx(errors[1], rel=1e-4)
    assert report["error"] < BitDelta().compress(layer.dw, Hessian(metric), None)[1]["error"]
