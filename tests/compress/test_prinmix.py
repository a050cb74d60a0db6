"""The method `prinmix`: within its budget, far better than the paper's, and each of its steps needed."""

from dataclasses import replace

import pytest
import torch

from tests.compress.layers import Layer, make_layer, relative_error
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.compress.methods.paper import compress_factors
from vllm_prinmix.compress.methods.prinmix import PrinMix, compress_jointly
from vllm_prinmix.compress.quantization.grid import clipped_grids, dequantize, quantize
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.whiten import whitened_svd
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors

SIZE = 192


def budget(layer: Layer, ratio: int) -> int:
    return 2 * layer.dw.numel() // ratio


def payload_bytes(factors: QuantizedFactors) -> int:
    return factors_bytes(factors.v_bits.tolist(), factors.u_bits.tolist(), *factors.shape)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer(SIZE, SIZE, decay=0.6, outliers=3)


@pytest.mark.parametrize(("ratio", "bound"), [(16, 0.55), (32, 0.6)])
@pytest.mark.parametrize("decay", [0.35, 0.6, 1.0])
def test_much_less_error_than_the_paper_in_the_same_bytes(decay: float, ratio: int, bound: float) -> None:
    """On inputs that calibration did not contain."""
    layer = make_layer(SIZE, SIZE, decay=decay, outliers=3)
    paper, _ = compress_factors(
        layer.dw, layer.calibration, budget_bytes=budget(layer, ratio), solver="exact"
    )
    ours, _ = compress_jointly(layer.dw, Hessian(layer.calibration), budget(layer, ratio))
    assert payload_bytes(ours) <= budget(layer, ratio)
    errors = [relative_error(layer.dw, f.dense(), layer.heldout) for f in (ours, paper)]
    assert errors[0] <= bound * errors[1]


def test_reported_error_is_the_measured_one(layer: Layer) -> None:
    factors, report = compress_jointly(layer.dw, Hessian(layer.calibration), budget(layer, 16))
    measured = relative_error(layer.dw, factors.dense(), layer.calibration)
    assert report["error"] == pytest.approx(measured, rel=1e-3)
    assert report["error"] <= report["error_first"]


@pytest.mark.parametrize(
    "without",
    [{"joint_objective": False}, {"whitening": False}, {"clipping": False}, {"alternations": 0}],
    ids=lambda step: next(iter(step)),
)
def test_every_step_lowers_the_error(layer: Layer, without: dict) -> None:
    hessian = Hessian(layer.calibration)
    _, full = compress_jointly(layer.dw, hessian, budget(layer, 16))
    _, less = compress_jointly(layer.dw, hessian, budget(layer, 16), replace(PrinMix(), **without))
    assert full["error"] < less["error"]


def test_same_input_same_result(layer: Layer) -> None:
    first, second = (
        compress_jointly(layer.dw, Hessian(layer.calibration), budget(layer, 32))[0] for _ in range(2)
    )
    for name in ("v_codes", "u_codes", "v_bits", "u_bits", "scale", "v_zero", "u_zero"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)], ids=str)
def test_embeddings_have_a_diagonal_metric(shape: tuple[int, int]) -> None:
    layer = make_layer(*shape, decay=1.0)
    counts = torch.arange(1.0, shape[1] + 1)
    factors, report = compress_jointly(layer.dw, Hessian(counts), budget(layer, 8))
    assert payload_bytes(factors) <= budget(layer, 8)
    assert report["error"] == pytest.approx(
        relative_error(layer.dw, factors.dense(), counts.diag()), rel=1e-3
    )
    assert report["error"] < 0.5


def test_nothing_to_store() -> None:
    factors, report = compress_jointly(torch.zeros(16, 24), Hessian(torch.eye(24)), 1000)
    assert factors.directions == 0
    assert report["error"] == 0


def test_whitened_directions(layer: Layer) -> None:
    """U is orthonormal, V in H's metric; and Eq. 5 holds with any error of V."""
    hessian = Hessian(layer.calibration)
    u, sigma, v = whitened_svd(layer.dw, hessian)
    eye = torch.eye(len(sigma))
    assert torch.allclose(u.T @ u, eye, atol=1e-4)
    damped = hessian.matrix + hessian.damping * torch.eye(hessian.size)
    assert torch.allclose(v @ damped @ v.T, eye, atol=1e-2)
    few = whitened_svd(layer.dw, hessian, 5)
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(few, (u[:, :5], sigma[:5], v[:5]), strict=True)
    )
    assert relative_error(layer.dw, (u * sigma) @ v, layer.calibration) < 1e-8
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    wrong = v + 0.1 * v.std(1, keepdim=True) * noise
    total = (hessian.norm(wrong - v) * sigma.double() ** 2).sum()
    measured = hessian.norm(layer.dw - (u * sigma) @ wrong).sum()
    assert float(measured) == pytest.approx(float(total), rel=1e-3)


def test_a_clipped_grid_suits_normal_numbers() -> None:
    """Two bits: min-max wastes its levels on the tails."""
    vectors = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    errors = [
        float((vectors - dequantize(quantize(vectors, grid), grid)).square().mean())
        for grid in clipped_grids(vectors, torch.full((8,), 2, dtype=torch.uint8))
    ]
    assert min(errors) < 0.125 < errors[0]  # 0.1188 is the optimum for a uniform grid


def test_options_of_another_method_are_refused() -> None:
    with pytest.raises(PrinMixError, match=r"no such option.*--method prinmix.*--solver"):
        registry.make("prinmix", solver="scip")
    with pytest.raises(PrinMixError, match=r"no such step.*rotation.*whitening"):
        registry.without("prinmix", ["rotation"])
    with pytest.raises(PrinMixError, match=r"need the width 0.*--bits.*found: 2,3"):
        registry.make("prinmix", bits=(2, 3))


def test_every_step_can_be_switched_off() -> None:
    options = registry.without("prinmix", [step.replace("_", "-") for step in PrinMix.steps])
    method = registry.make("prinmix", **options)
    assert not any(getattr(method, step) for step in PrinMix.steps)
