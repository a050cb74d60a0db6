"""`gpt-zip`: 2 bits, then 95 % zeros."""

from math import log2

import pytest
import torch

from tests.compress.layers import make_layer
from vllm_prinmix.compress.methods.gpt_zip import GptZip, largest, native_bytes
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, symmetric_grid
from vllm_prinmix.compress.quantization.hessian import Hessian


def test_the_largest_twentieth_of_the_quantized_delta() -> None:
    layer = make_layer(80, 100, outliers=2)
    hessian = Hessian(layer.calibration)
    quantized, report = GptZip().compress(layer.dw, hessian, None)
    found = quantized.dense()
    grid = symmetric_grid(layer.dw, torch.full((80,), 2, dtype=torch.uint8))
    whole = dequantize(gptq(layer.dw, hessian, grid), grid)
    kept = found != 0
    assert int(kept.sum()) == 400
    assert torch.equal(found[kept], whole[kept])
    assert whole[kept].abs().min() >= whole[~kept].abs().max()
    assert report["native_bytes"] == native_bytes(80, 100, 400)


def test_equal_values_are_told_apart_by_the_delta() -> None:
    values = torch.tensor([[1.0, -1.0, 0.5], [1.0, 0.0, 2.0]])
    ties = torch.tensor([[0.9, -1.1, 9.0], [1.0, 9.0, 0.1]])
    assert largest(values, ties, 3).tolist() == [[False, True, False], [True, False, True]]


def test_native_bytes() -> None:
    assert native_bytes(10, 10, 0) == 20
    places = 1000 * (-0.05 * log2(0.05) - 0.95 * log2(0.95))
    assert native_bytes(10, 100, 50) == pytest.approx((100 + places) / 8 + 20, abs=1)
