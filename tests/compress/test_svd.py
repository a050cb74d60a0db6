from __future__ import annotations

import pytest
import torch

from vllm_prinmix.compress.quantization.svd import thin_svd


@pytest.mark.parametrize(
    "shape", [(40, 40), (20, 90), (90, 20), (1, 30), (30, 1), (1, 1), (8, 20000)], ids=str
)
def test_equals_the_library(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sigma, v = thin_svd(matrix)
    assert torch.allclose(sigma, torch.linalg.svdvals(matrix), rtol=1e-5)
    assert torch.allclose((u * sigma) @ v, matrix, atol=1e-4)
    for orthonormal in (u.T @ u, v @ v.T):
        assert torch.allclose(orthonormal, torch.eye(len(sigma)), atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)], ids=str)
def test_directions_without_a_singular_value_are_left_out(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    left = torch.randint(-3, 4, (shape[0], 4), generator=random).float()
    right = torch.randint(-3, 4, (4, shape[1]), generator=random).float()
    u, sigma, v = thin_svd(left @ right)
    assert len(sigma) == 4
    assert torch.allclose((u * sigma) @ v, left @ right, atol=1e-3)


def test_a_zero_matrix_has_no_directions() -> None:
    u, sigma, v = thin_svd(torch.zeros(3, 5))
    assert (u.shape, sigma.shape, v.shape) == ((3, 0), (0,), (0, 5))
