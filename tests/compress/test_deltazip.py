"""`deltazip`: 2:4 sparsity chosen and fed back group by group."""

import pytest
import torch

from tests.compress.layers import make_layer, relative_error
from vllm_prinmix.compress.methods import deltazip
from vllm_prinmix.compress.methods.deltazip import DeltaZip, native_bytes, sparse_gptq
from vllm_prinmix.compress.quantization.grid import dequantize, symmetric_grid
from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian


def reference(weight: torch.Tensor, metric: torch.Tensor, bits: int) -> torch.Tensor:
    """SparseGPT as published, on the inverse's Cholesky factor, columns last to first; float64."""
    weight, metric = weight.double().flip(1), metric.double().flip(0, 1)
    cols = weight.shape[1]
    damped = metric + DAMPING * metric.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scale = 2 * weight.abs().amax(1) / (2**bits - 1)
    found = torch.zeros_like(weight)
    first_size = cols % 4 or 4  # the short group is the first one visited
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for k in range(cols):
        if k == 0 or (k >= first_size and (k - first_size) % 4 == 0):
            group = slice(k, first_size if k == 0 else k + 4)
            score = (weight[:, group] / inverse.diagonal()[group]) ** 2
            for row, entries in enumerate(score.tolist()):
                order = sorted(range(len(entries)), key=lambda i: -entries[i])[:2]
                keep[row, [k + i for i in order]] = True
        code = torch.round(weight[:, k] / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        found[:, k] = torch.where(keep[:, k], code * scale, 0.0)
        error = (weight[:, k] - found[:, k]) / inverse[k, k]
        weight[:, k:] -= error[:, None] * inverse[k, k:]
    return found.flip(1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("cols", [64, 70, 3])
def test_against_the_published_algorithm(monkeypatch: pytest.MonkeyPatch, bits: int, cols: int) -> None:
    layer = make_layer(24, cols, outliers=1)
    monkeypatch.setattr(deltazip, "BLOCK", 16)
    grid = symmetric_grid(layer.dw, torch.full((24,), bits, dtype=torch.uint8))
    found = dequantize(sparse_gptq(layer.dw, Hessian(layer.calibration), grid), grid)
    expected = reference(layer.dw, layer.calibration, bits)
    # A value between two codes may fall to either side, and then all after it differ: in a row at most.
    same = torch.isclose(found.double(), expected, atol=1e-5).all(dim=1)
    assert same.float().mean() > 0.95
    errors = [relative_error(layer.dw, w.float(), layer.calibration) for w in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("bits", [2, 4])
def test_two_of_four(bits: int) -> None:
    layer = make_layer(50, 130)
    quantized, report = DeltaZip(bits=(bits,)).compress(layer.dw, Hessian(layer.calibration), None)
    used = torch.nn.functional.pad(quantized.dense() != 0, (0, 2)).view(50, -1, 4).sum(2)
    assert used.max() == 2
    assert (quantized.zero == 2 ** (bits - 1)).all()
    assert report["native_bytes"] == native_bytes(bits, 50, 130) == 50 * 33 * 2 * (bits + 2) // 8 + 100


def test_a_diagonal_metric_is_its_dense_form() -> None:
    layer = make_layer(20, 30)
    grid = symmetric_grid(layer.dw, torch.full((20,), 4, dtype=torch.uint8))
    counts = torch.arange(1.0, 31)
    codes = [sparse_gptq(layer.dw, Hessian(metric), grid) for metric in (counts, counts.diag())]
    assert torch.equal(*codes)
