"""`--calibration none`: a delta without data, with every method, and what `verify` says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.compress.layers import make_layer
from tests.compress.pairs import Pair, build, finetune, tiny_config
from vllm_prinmix.compress import inspection, stream
from vllm_prinmix.compress.calibration import NONE
from vllm_prinmix.compress.measure import activation_error
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.compress.metrics import SPREAD, _expected_moments, data_free
from vllm_prinmix.compress.model import build_model, expected_tensors, is_tied
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import minmax_grid, quantize
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.rtc import correct_target
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.compress.quantization.whiten import whitened_svd
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint
from vllm_prinmix.format.delta import read_config

DIAGONAL = torch.linspace(0.1, 4, 96)


def matrix(rows: int = 64, cols: int = 96) -> torch.Tensor:
    return make_layer(rows, cols, seed=5).dw


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_matrix_has_a_metric(tmp_path: Path, architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_word_embeddings=tied)
    build(config, seed=0).save_pretrained(tmp_path)
    model, checkpoint = build_model(config), Checkpoint(tmp_path)
    shapes = {n: s for n, (_, s) in expected_tensors(model).items() if len(s) == 2}
    changed = build(config, seed=0)
    finetune(changed, seed=1)
    changed.save_pretrained(tmp_path / "tuned")
    arguments = model, checkpoint, Checkpoint(tmp_path / "tuned")
    found = dict(data_free(*arguments, set(shapes), torch.device("cpu")))
    assert set(found) == set(shapes)
    for name, hessian in found.items():
        rows, cols = shapes[name]
        assert hessian.is_diagonal == (name == EMBEDDING)
        assert hessian.size == (rows if name == EMBEDDING and not is_tied(model) else cols)
    some = {"model.layers.1.self_attn.k_proj.weight"}
    assert [name for name, _ in data_free(*arguments, some, torch.device("cpu"))] == list(some)
    assert (HEAD in found) != tied


def test_the_metric_is_made_of_the_change_and_the_norm() -> None:
    """The documented formula, entry by entry; in other units of the inputs it is the same metric."""
    dw, weights = matrix(6, 5), torch.tensor([1.0, 0.5, 3.0, 2.0, 0.1])
    found = _expected_moments(dw, weights)
    scaled = dw * weights
    mean = sum(float(scaled[:, k] @ scaled[:, k]) for k in range(5)) / 5
    for k in range(5):
        for j in range(5):
            moment = float(scaled[:, k] @ scaled[:, j]) / mean + (SPREAD if k == j else 0.0)
            assert float(found[k, j]) == pytest.approx(float(weights[k] * weights[j]) * moment, rel=1e-4)
    units = torch.tensor([1.0, 64.0, 0.25, 1.0, 7.0])  # x_k and w_k are multiplied, dW is divided
    other = _expected_moments(dw / units, weights * units)
    torch.testing.assert_close(other, found * units[:, None] * units, rtol=1e-4, atol=1e-6)


def test_a_diagonal_metric_is_the_dense_one() -> None:
    """All that knows both forms does the same with either."""
    dw, dense, diagonal = matrix(), Hessian(DIAGONAL.diag()), Hessian(DIAGONAL)
    torch.testing.assert_close(diagonal.norm(dw), dense.norm(dw))
    torch.testing.assert_close(diagonal.times(dw), dense.times(dw))
    u, sigma, v = thin_svd(dw)
    grid = minmax_grid(v, torch.full((len(v),), 3, dtype=torch.uint8))
    assert torch.equal(gptq(v, diagonal, grid), quantize(v, grid))
    assert torch.equal(gptq(v, diagonal, grid), gptq(v, dense, grid))
    for one, other in zip(
        correct_target(dw, u, sigma[:, None] * v.round(decimals=1), diagonal),
        correct_target(dw, u, sigma[:, None] * v.round(decimals=1), dense),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    (u1, s1, v1), (u2, s2, v2) = whitened_svd(dw, diagonal), whitened_svd(dw, dense)
    torch.testing.assert_close(s1, s2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((u1 * s1) @ v1, (u2 * s2) @ v2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", registry.METHODS)
def test_every_method_takes_a_diagonal_metric(name: str) -> None:
    method = registry.make(name, **({"solver": "exact"} if name == "prinmix-paper" else {}))
    dw, hessian = matrix(), Hessian(DIAGONAL)
    budget = None if method.has_own_size else 64 * 96 * 2 // 8
    change, report = method.compress(dw, hessian, budget)
    error = activation_error(dw, change.dense(), hessian)
    assert report["error"] == pytest.approx(error, rel=1e-3)
    assert error < 1


def test_without_data_and_without_a_forward_pass(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair("qwen3")
    for file in [*pair.base.glob("token*"), *pair.finetuned.glob("token*")]:
        file.rename(file.with_suffix(".hidden"))  # no tokenizer is needed
    with monkeypatch.context() as patch:
        for name in ("run_layer", "embed", "head_moments"):
            patch.delattr(stream, name)
        compress(dataclasses.replace(pair, calibration=Path(NONE)), tmp_path / "delta")
    config = read_config(tmp_path / "delta")
    assert config.calibration is None
    inspection.show(inspection.describe(tmp_path / "delta"), console)
    assert "made without calibration data" in console.file.getvalue()  # type: ignore[attr-defined]

    models = (str(pair.base), str(pair.finetuned))
    entries = verify(tmp_path / "delta", *models, None, console)
    recorded = {name: spec.report for name, spec in config.modules.items() if spec.kind == "factors"}
    for entry in entries:
        if entry["name"] in recorded:
            for field in ("error", "weight_error"):
                assert entry[field] == pytest.approx(recorded[entry["name"]][field], rel=1e-2)


def test_verify_measures_on_data_that_the_delta_was_made_without(
    make_pair: Callable[..., Pair], compress: Callable[..., str], console: Console, tmp_path: Path
) -> None:
    pair = make_pair()
    models = (str(pair.base), str(pair.finetuned))
    compress(dataclasses.replace(pair, calibration=Path(NONE)), tmp_path / "free")
    compress(pair, tmp_path / "calibrated")
    name = "model.layers.1.self_attn.q_proj.weight"
    errors = {}
    for folder in ("free", "calibrated"):
        for source in (str(pair.calibration), NONE):
            entries = verify(tmp_path / folder, *models, source, console)
            errors[folder, source] = {e["name"]: e["error"] for e in entries if "error" in e}[name]
    assert errors["calibrated", str(pair.calibration)] < errors["free", str(pair.calibration)]
    assert errors["free", NONE] < errors["calibrated", NONE]
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("errors are not compared") == 2


def test_no_calibration_at_all_is_an_error_that_names_the_way_out(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(PrinMixError, match=r"required.*prinmix calibration"):
        compress(make_pair(), tmp_path / "delta", calibration=None)
