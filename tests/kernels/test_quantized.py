"""dense() of a quantized delta is what the reference computes with."""

import torch

from tests.kernels.deltas import random_factors, random_matrix, relative_error
from vllm_prinmix.kernels import reference


def test_dense_factors_equal_the_reference() -> None:
    delta = random_factors(70, 50, 12, (1, 4, 8), seed=0, row_scale=True)
    identity = torch.eye(50)
    assert relative_error(delta.dense().T, reference.linear(identity, delta)) < 1e-6
    assert relative_error(delta.dense(), reference.embedding(torch.arange(70), delta)) < 1e-6


def test_dense_matrix_equals_the_reference() -> None:
    delta = random_matrix(20, 30, 5, seed=0)
    assert relative_error(delta.dense().T, reference.linear(torch.eye(30), delta)) < 1e-6
