"""`low-rank`: truncated SVD, nothing more."""

import pytest
import torch

from tests.compress.layers import make_layer
from vllm_prinmix.compress.methods.low_rank import LowRank, low_rank_fp16
from vllm_prinmix.compress.quantization.hessian import Hessian


def truncated(dw: torch.Tensor, rank: int) -> torch.Tensor:
    u, sigma, v = torch.linalg.svd(dw.double(), full_matrices=False)
    return ((u[:, :rank] * sigma[:rank]) @ v[:rank]).float()


@pytest.mark.parametrize("shape", [(128, 256), (256, 128)], ids=str)
def test_eight_bits_of_the_truncated_svd(shape: tuple[int, int]) -> None:
    layer = make_layer(*shape)
    limit = 10 * (128 + 256 + 8) + 390  # 10 directions, not 11
    factors, _ = LowRank().compress(layer.dw, Hessian(layer.calibration), limit)
    assert factors.directions == 10
    assert (factors.v_bits == 8).all()
    assert (factors.u_bits == 8).all()
    reference = truncated(layer.dw, 10)
    assert (factors.dense() - reference).norm() < 0.02 * reference.norm()


def test_all_of_a_deficient_matrix() -> None:
    dw = torch.ones(30, 40)
    factors, report = LowRank().compress(dw, Hessian(torch.eye(40)), 10_000)
    assert factors.directions == 1
    assert report["error"] < 1e-5


def test_half_precision_factors() -> None:
    layer = make_layer(50, 70)
    reference = truncated(layer.dw, 5)
    found = low_rank_fp16(layer.dw, 2 * 5 * (50 + 70))
    assert (found - reference).norm() < 1e-3 * reference.norm()
    assert not low_rank_fp16(layer.dw, 2 * (50 + 70) - 1).any()
