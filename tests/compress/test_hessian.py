from __future__ import annotations

import pytest
import torch

from tests.compress.layers import make_layer
from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian, damped_cholesky
from vllm_prinmix.errors import PrinMixError


def test_norm_is_the_squared_length_of_the_outputs() -> None:
    random = torch.Generator().manual_seed(0)
    inputs, rows = torch.randn(40, 100, generator=random), torch.randn(7, 40, generator=random)
    norm = Hessian(inputs @ inputs.T).norm(rows)
    assert norm.dtype == torch.float64
    assert torch.allclose(norm, (rows.double() @ inputs.double()).square().sum(1), rtol=1e-5)


def test_diagonal_form_equals_the_dense_one() -> None:
    random = torch.Generator().manual_seed(0)
    counts, rows = torch.rand(30, generator=random), torch.randn(5, 30, generator=random)
    assert torch.allclose(Hessian(counts).norm(rows), Hessian(counts.diag()).norm(rows))
    assert torch.allclose(Hessian(counts).times(rows), Hessian(counts.diag()).times(rows))


def test_feedback_factorises_the_damped_reordered_matrix() -> None:
    matrix = make_layer(64, 64, outliers=3).calibration
    order, factor, pivots = Hessian(matrix).feedback
    assert (matrix.diagonal()[order].diff() >= 0).all()
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(64)
    lower = factor.double().tril()
    pivots = torch.linalg.solve(lower, damped[order][:, order].double())
    pivots = torch.linalg.solve(lower, pivots.T).diagonal()
    assert torch.allclose((lower * pivots) @ lower.T, damped[order][:, order].double(), rtol=1e-4, atol=1e-2)
    assert torch.equal(factor.diagonal(), torch.ones(64))


def test_solve_inverts_the_damped_matrix() -> None:
    matrix = make_layer(64, 64, outliers=3).calibration
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(64)
    expected = torch.linalg.solve(damped.double(), rows.T.double()).T
    assert (Hessian(matrix).solve(rows) - expected).norm() <= 1e-4 * expected.norm()
    counts = 1 + torch.rand(64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(Hessian(counts).solve(rows), rows / counts)


def test_more_damping_is_tried_with_a_warning() -> None:
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = 1.05
    with pytest.warns(UserWarning, match="increased 10 times"):
        lower = damped_cholesky(matrix.clone(), torch.tensor(0.01))
    assert torch.allclose(lower @ lower.T, matrix + 0.1 * torch.eye(4))


def test_an_indefinite_matrix_is_an_error() -> None:
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = 50.0
    with pytest.raises(PrinMixError, match="not positive semi-definite"):
        damped_cholesky(matrix, torch.tensor(0.01))


def test_a_module_that_calibration_never_reached_weighs_its_inputs_alike() -> None:
    with pytest.warns(UserWarning, match="never reached"):
        hessian = Hessian(torch.zeros(6, 6))
    assert torch.equal(hessian.norm(torch.ones(1, 6)), torch.tensor([6.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3, 4), "wrong shape"),
        (torch.full((3, 3), torch.nan), "NaN or infinite"),
        (torch.tensor([1.0, torch.inf]), "NaN or infinite"),
        (torch.tensor([1.0, -1.0]), "negative diagonal"),
    ],
    ids=["shape", "nan", "inf", "negative"],
)
def test_bad_metrics_are_errors(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(PrinMixError, match=message):
        Hessian(matrix)
