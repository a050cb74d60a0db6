from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compress.layers import make_layer, relative_error
from vllm_prinmix.compress.methods.paper import (
    CANDIDATE_BITS,
    compress_factors,
    direction_bytes,
    simulate,
)
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors

FIELDS = ("v_codes", "u_codes", "v_bits", "u_bits", "scale", "v_zero", "u_zero")


def payload(factors: QuantizedFactors) -> int:
    return factors_bytes(factors.v_bits.tolist(), factors.u_bits.tolist(), *factors.shape)


def low_rank_error(dw: torch.Tensor, metric: torch.Tensor, budget: int) -> float:
    """Truncated SVD in float16 with as many directions as ``budget`` bytes hold."""
    u, sigma, v = thin_svd(dw)
    rank = budget // (2 * sum(dw.shape))
    halves = [part.half().float() for part in (u[:, :rank] * sigma[:rank], v[:rank])]
    return relative_error(dw, halves[0] @ halves[1], metric)


@pytest.mark.parametrize(("rows", "cols"), [(60, 60), (40, 90), (90, 40)])
def test_equation_5_is_the_measured_error(rows: int, cols: int) -> None:
    """Sum of sigma_i^2 dv_i H dv_i^T = ||(dW - U S V^) X||^2, with mixed widths and dropped directions."""
    layer = make_layer(rows, cols, outliers=3)
    u, sigma, v = thin_svd(layer.dw)
    hessian = Hessian(layer.calibration)
    table = simulate(v, sigma, hessian, CANDIDATE_BITS)
    choice = torch.arange(len(sigma)) % len(CANDIDATE_BITS)
    bits = torch.tensor(CANDIDATE_BITS, dtype=torch.uint8)[choice]
    grid = minmax_grid(v, bits.clamp(min=1))
    v_hat = dequantize(gptq(v, hessian, grid), grid) * (bits > 0)[:, None]
    wrong = layer.dw.double() - (u.double() * sigma) @ v_hat.double()
    measured = ((wrong @ layer.calibration.double()) * wrong).sum()
    predicted = table[torch.arange(len(sigma)), choice].sum()
    assert float(predicted) == pytest.approx(float(measured), rel=1e-5)


def test_the_simulated_errors_do_not_depend_on_the_stacking(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(50, 70)
    _, sigma, v = thin_svd(layer.dw)
    hessian = Hessian(layer.calibration)
    whole = simulate(v, sigma, hessian, CANDIDATE_BITS)
    monkeypatch.setattr("vllm_prinmix.compress.methods.paper.SIMULATED_ENTRIES", 8 * 7 * 70)
    assert torch.allclose(simulate(v, sigma, hessian, CANDIDATE_BITS), whole, rtol=1e-5)
    assert (whole.diff(dim=1) < 0).double().mean() > 0.95  # more bits, less error


@pytest.mark.parametrize("solver", ["scip", "exact"])
def test_report_tells_what_was_done(solver: str) -> None:
    layer = make_layer(96, 160, outliers=2)
    budget = 96 * 160 // 8
    factors, report = compress_factors(
        layer.dw, layer.calibration, budget_bytes=budget, candidate_bits=(0, 2, 3, 4), solver=solver
    )
    assert report.error == pytest.approx(
        relative_error(layer.dw, factors.dense(), layer.calibration), rel=1e-4
    )
    assert report.error_v_predicted == pytest.approx(report.error_v, rel=1e-4)
    assert report.error_rtc <= report.error_v
    assert report.error_rtc < report.error < 1
    assert sum(report.directions.values()) == 96
    assert [report.directions[bits] for bits in (2, 3, 4)] == [
        int((factors.v_bits == bits).sum()) for bits in (2, 3, 4)
    ]
    assert report.payload_bytes == payload(factors) <= budget
    assert (report.solver, report.solver_gap) == (solver, 0)
    assert set(report.seconds) == {
        "svd",
        "simulate",
        "allocate",
        "quantize V",
        "correct U",
        "quantize U",
        "report",
    }


def test_factors_are_sorted_by_width_and_then_by_singular_value() -> None:
    layer = make_layer(200, 140, decay=1.0)
    factors, _ = compress_factors(layer.dw, layer.calibration, budget_bytes=6_000, solver="exact")
    assert torch.equal(factors.v_bits, factors.u_bits)
    assert (factors.v_bits.int().diff() <= 0).all()
    assert len(factors.v_bits.unique()) > 1
    assert (factors.v_codes.amax(dim=1).int() < 2 ** factors.v_bits.int()).all()
    assert (factors.u_codes.amax(dim=1).int() < 2 ** factors.u_bits.int()).all()
    strength = (factors.u() * factors.scale[:, None]).norm(dim=1) * factors.v().norm(dim=1)
    for bits in factors.v_bits.unique():
        of_width = strength[factors.v_bits == bits]
        assert (of_width[1:] < 1.3 * of_width[:-1]).all()  # quantized, so only about sigma


def test_types_and_shapes() -> None:
    layer = make_layer(30, 50)
    factors, _ = compress_factors(layer.dw, layer.calibration, budget_bytes=2_000, solver="exact")
    n = factors.directions
    assert n > 0
    assert factors.shape == (30, 50)
    for name, dtype, shape in [
        ("v_codes", torch.uint8, (n, 50)),
        ("u_codes", torch.uint8, (n, 30)),
        ("v_bits", torch.uint8, (n,)),
        ("u_bits", torch.uint8, (n,)),
        ("scale", torch.float32, (n,)),
        ("v_zero", torch.float16, (n,)),
        ("u_zero", torch.float16, (n,)),
    ]:
        tensor = getattr(factors, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
        assert tensor.is_contiguous(), name


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 200),
    cols=st.integers(1, 200),
    share=st.floats(0, 1.2),
    bits=st.sets(st.integers(1, 8), min_size=1, max_size=4),
    max_active=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_the_budget_is_never_exceeded(
    rows: int, cols: int, share: float, bits: set[int], max_active: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    dw = torch.randn(rows, cols, generator=random) / 100
    inputs = torch.randn(cols, 64, generator=random)
    budget = int(share * 2 * rows * cols)
    factors, report = compress_factors(
        dw,
        inputs @ inputs.T,
        budget_bytes=budget,
        candidate_bits=(0, *sorted(bits)),
        max_active_bits=max_active,
        solver="exact",
    )
    assert payload(factors) == report.payload_bytes <= budget
    assert len(set(factors.v_bits.tolist())) + (report.directions[0] > 0) <= max_active
    assert factors.dense().isfinite().all()


@pytest.mark.parametrize("share", [1 / 32, 1 / 16, 1 / 8, 1 / 4])
def test_a_budget_is_used(share: float) -> None:
    layer = make_layer(256, 256)
    budget = int(share * 2 * 256 * 256)
    _, report = compress_factors(layer.dw, layer.calibration, budget_bytes=budget, solver="exact")
    assert budget - direction_bytes(2, 256, 256) < report.payload_bytes <= budget


def test_more_bytes_less_error() -> None:
    layer = make_layer(128, 128, outliers=2)
    errors = [
        compress_factors(layer.dw, layer.calibration, budget_bytes=budget, solver="exact")[1].error
        for budget in (1_000, 2_000, 4_000, 8_000, 16_000)
    ]
    assert all(more < 0.8 * less for less, more in pairwise(errors))


def test_order_of_quality_at_one_bit_per_parameter() -> None:
    """A layer with the spectrum of real deltas: less than half of truncated SVD's error, on other data."""
    layer = make_layer(512, 512, decay=0.6)
    budget = 512 * 512 // 8
    factors, report = compress_factors(layer.dw, layer.calibration, budget_bytes=budget, solver="exact")
    heldout = relative_error(layer.dw, factors.dense(), layer.heldout)
    assert heldout < 0.5 * low_rank_error(layer.dw, layer.heldout, budget)
    assert heldout < 1.3 * report.error


@pytest.mark.parametrize(("rows", "cols", "rank"), [(1, 40, 1), (1, 1, 1), (50, 30, 3)], ids=str)
def test_small_and_deficient_matrices_with_a_generous_budget(rows: int, cols: int, rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    dw = torch.randn(rows, rank, generator=random) @ torch.randn(rank, cols, generator=random)
    inputs = torch.randn(cols, 99, generator=random)
    factors, report = compress_factors(dw, inputs @ inputs.T, budget_bytes=8_000, solver="exact")
    assert factors.directions == rank
    assert report.error < 1e-3


@pytest.mark.parametrize("budget", [0, 15, direction_bytes(2, 64, 64) - 1])
def test_a_budget_below_one_direction_gives_none(budget: int) -> None:
    layer = make_layer(64, 64)
    factors, report = compress_factors(layer.dw, layer.calibration, budget_bytes=budget, solver="exact")
    assert (factors.directions, report.payload_bytes, report.error) == (0, 0, 1.0)
    assert torch.equal(factors.dense(), torch.zeros(64, 64))


def test_a_zero_delta_gives_no_directions() -> None:
    factors, report = compress_factors(torch.zeros(8, 6), torch.eye(6), budget_bytes=1_000)
    assert (factors.directions, factors.shape, report.error) == (0, (8, 6), 0.0)


def test_a_diagonal_metric_equals_its_dense_form() -> None:
    random = torch.Generator().manual_seed(0)
    dw, counts = torch.randn(20, 70, generator=random), torch.randint(1, 50, (70,), generator=random).float()
    diagonal, dense = (
        compress_factors(dw, metric, budget_bytes=900, solver="exact")[0]
        for metric in (counts, counts.diag())
    )
    assert torch.equal(diagonal.v_codes, dense.v_codes)
    assert torch.allclose(diagonal.dense(), dense.dense(), atol=1e-4)


def test_a_vocabulary_never_becomes_a_square_matrix() -> None:
    """Embeddings are compressed as [hidden, vocabulary]: 100,000 squared would be 40 GB."""
    random = torch.Generator().manual_seed(0)
    dw = torch.randn(4, 100_000, generator=random)
    counts = torch.randint(1, 9, (100_000,), generator=random).float()
    factors, report = compress_factors(dw, counts, budget_bytes=4 * 100_000, solver="exact")
    assert report.payload_bytes <= 4 * 100_000
    assert report.error < 0.01
    assert factors.transpose().shape == (100_000, 4)


def test_transpose_swaps_the_factors() -> None:
    layer = make_layer(30, 50)
    factors, _ = compress_factors(layer.dw, layer.calibration, budget_bytes=900, solver="exact")
    swapped = factors.transpose()
    assert torch.allclose(swapped.dense(), factors.dense().T, atol=1e-6)
    assert swapped.shape == (50, 30)
    factors.row_scale = torch.ones(30, dtype=torch.float16)
    with pytest.raises(ValueError, match="row scale"):
        factors.transpose()


def test_the_same_inputs_give_the_same_bytes() -> None:
    layer = make_layer(120, 90, outliers=1)
    runs = [
        compress_factors(layer.dw, layer.calibration, budget_bytes=2_400, solver=solver)[0]
        for solver in ("scip", "scip")
    ]
    for name in FIELDS:
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name


def test_inputs_that_calibration_never_saw_are_still_stored() -> None:
    layer = make_layer(40, 40)
    layer.calibration[-5:] = 0
    layer.calibration[:, -5:] = 0
    factors, _ = compress_factors(layer.dw, layer.calibration, budget_bytes=9_000, solver="exact")
    unseen, kept = layer.dw[:, -5:], factors.dense()[:, -5:]
    assert (unseen - kept).square().sum() < 0.05 * unseen.square().sum()


def test_calibration_that_never_reached_the_module_falls_back_to_plain_distance() -> None:
    dw = make_layer(40, 40).dw
    with pytest.warns(UserWarning, match="never reached"):
        lost, _ = compress_factors(dw, torch.zeros(40, 40), budget_bytes=1_500, solver="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, _ = compress_factors(dw, torch.ones(40), budget_bytes=1_500, solver="exact")
    assert torch.equal(lost.dense(), plain.dense())


@pytest.mark.parametrize(
    ("dw", "metric", "bits", "budget", "message"),
    [
        (torch.full((4, 4), torch.nan), torch.eye(4), (0, 2), 999, "NaN or infinite"),
        (torch.ones(4, 4), torch.full((4, 4), torch.inf), (0, 2), 999, "NaN or infinite"),
        (torch.ones(4, 4), torch.eye(5), (0, 2), 999, "differ in width"),
        (torch.ones(4), torch.eye(4), (0, 2), 999, "not a matrix"),
        (torch.ones(4, 4), torch.eye(4), (0, 2, 2), 999, "bad candidate bits"),
        (torch.ones(4, 4), torch.eye(4), (0, 9), 999, "bad candidate bits"),
        (torch.ones(4, 4), torch.eye(4), (), 999, "bad candidate bits"),
        (torch.ones(4, 4), torch.eye(4), (2, 3), 10, "below the cheapest"),
    ],
    ids=["nan", "inf-metric", "width", "vector", "twice", "nine", "none", "budget"],
)
def test_bad_input_is_an_error(
    dw: torch.Tensor, metric: torch.Tensor, bits: tuple[int, ...], budget: int, message: str
) -> None:
    with pytest.raises(PrinMixError, match=message):
        compress_factors(dw, metric, budget_bytes=budget, candidate_bits=bits, solver="exact")
