"""`gptq`: the delta without SVD at the widest width, each row on the best of its grids."""

import pytest
import torch

from tests.compress.layers import make_layer
from vllm_prinmix.compress.methods.gptq import Gptq
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import matrix_bytes


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_widest_width_that_fits(bits: int) -> None:
    layer = make_layer(60, 130)
    hessian = Hessian(layer.calibration)
    for limit in (matrix_bytes(bits, 60, 130), matrix_bytes(bits + 1, 60, 130) - 1):
        quantized, _ = Gptq(clipping=False).compress(layer.dw, hessian, limit)
        assert quantized.bits == bits
    grid = minmax_grid(layer.dw, torch.full((60,), bits, dtype=torch.uint8))
    assert torch.equal(quantized.dense(), dequantize(gptq(layer.dw, hessian, grid), grid))
    fixed, _ = Gptq(bits=(bits,), clipping=False).compress(layer.dw, hessian, None)
    assert torch.equal(fixed.dense(), quantized.dense())


def test_a_budget_below_one_bit_is_an_error() -> None:
    with pytest.raises(PrinMixError, match="not even one bit"):
        Gptq().compress(torch.ones(60, 130), Hessian(torch.eye(130)), matrix_bytes(1, 60, 130) - 1)


def test_the_best_of_several_grids_is_worth_it() -> None:
    layer = make_layer(60, 90, outliers=2)
    hessian = Hessian(layer.calibration)
    _, plain = Gptq(bits=(2,), clipping=False).compress(layer.dw, hessian, None)
    _, clipped = Gptq(bits=(2,)).compress(layer.dw, hessian, None)
    assert clipped["error"] < 0.7 * plain["error"]
