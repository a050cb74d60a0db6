"""The compression benchmark: its straightforward methods agree with ours, and what it writes is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import compression
from benchmarks.compression_report import markdown
from benchmarks.generate_delta import SHAPES, Shape
from benchmarks.generate_pair import CHANGE, generate_pair
from benchmarks.straightforward import Straightforward, gptq, second_moments
from tests.compress.layers import make_layer, relative_error
from vllm_prinmix.compress.measure import relative_size
from vllm_prinmix.compress.methods.paper import compress_factors
from vllm_prinmix.compress.methods.prinmix import compress_jointly
from vllm_prinmix.compress.metrics import hessians
from vllm_prinmix.compress.model import build_model, read_architecture
from vllm_prinmix.compress.quantization import gptq as ours
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.stopwatch import Stopwatch
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.kernels.packing import factors_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(96, 128), (160, 64)], ids=str)
@pytest.mark.parametrize("method", compression.METHODS)
def test_the_straightforward_method_gives_the_same_error(method: str, shape: tuple[int, int]) -> None:
    layer = make_layer(*shape, outliers=3)
    budget = 2 * layer.dw.numel() // 8
    watch = Stopwatch()
    plain = Straightforward(layer.dw, layer.calibration, budget, watch)
    if method == "prinmix":
        factors, error = plain.prinmix()
        expected = compress_jointly(layer.dw, Hessian(layer.calibration), budget)[1]["error"]
    else:
        factors, error = plain.paper()
        expected = compress_factors(layer.dw, layer.calibration, budget_bytes=budget, solver="exact")[1].error
    assert error == pytest.approx(expected, rel=0.03)
    assert error == pytest.approx(relative_error(layer.dw, factors.dense(), layer.calibration), rel=1e-3)
    assert factors_bytes(factors.v_bits.tolist(), factors.u_bits.tolist(), *shape) <= budget
    assert {"factorise", "factorise again", "svd", "simulate", "allocate", "quantize"} <= set(watch.seconds)


def test_gptq_as_published_gives_the_same_codes() -> None:
    layer = make_layer(24, 300)
    grid = minmax_grid(layer.dw, torch.full((24,), 3, dtype=torch.uint8))
    hessian = Hessian(layer.calibration)
    codes, expected = gptq(layer.dw, layer.calibration, grid), ours.gptq(layer.dw, hessian, grid)
    assert (codes != expected).float().mean() < 0.01  # rounding of what lies between two codes
    norms = [float(hessian.norm(layer.dw - dequantize(c, grid)).sum()) for c in (codes, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_generated_pair(tmp_path: Path) -> None:
    """Two whole checkpoints; the change of the linears is small and falls by a power law; H is the same."""
    base, finetuned = map(Checkpoint, generate_pair(tmp_path, SHAPES["tiny"], 2))
    assert base.tensors.keys() == finetuned.tensors.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (side.load(name, torch.float32) for side in (base, finetuned))
    assert relative_size(after - before, before) == pytest.approx(CHANGE, rel=0.05)
    sigma = torch.linalg.svdvals(after - before)
    assert 2 < sigma[0] / sigma[16] < 8
    model = build_model(read_architecture(finetuned))
    samples = list(torch.randint(1024, (3, 64)))
    plain = second_moments(finetuned.folder, samples, 1, torch.device("cpu"))
    assert len(plain) == 7
    for name, hessian in hessians(model, finetuned, samples, set(plain), torch.device("cpu")):
        assert torch.allclose(plain[name], hessian.matrix, rtol=1e-3, atol=1e-3 * float(plain[name].max()))


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(compression.main)
    return CliRunner().invoke(app, arguments)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program, with its child processes."""
    monkeypatch.setitem(SHAPES, "mini", Shape(128, 256, 4, 2, 1, 1024))
    options = ["--shape", "mini", "--layers", "2", "--samples", "2", "--tokens", "32", "--threads", "1"]
    options += ["--methods", "prinmix", "--budget-seconds", "0", "--device", "cpu", "--out", str(tmp_path)]
    result = run(*options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "compression.json").read_text())
    names = ["prinmix", "prinmix, straightforward", "prinmix, compensated"]
    line, plain, compensated = (found["contenders"].pop(name) for name in names)
    assert not found["contenders"]
    found = json.loads((tmp_path / "compression.json").read_text())
    first = "model.layers.0.self_attn.q_proj.weight"
    assert compensated["errors"][first] == line["errors"][first], "nothing is before it"
    assert compensated["errors"].keys() == line["errors"].keys()
    assert compensated["payload_bytes"] == line["payload_bytes"]
    assert (line["layers"], found["layers"]) == (1, 4), "the budget was over after the first"
    assert line["peak_bytes"] > 1e8
    assert set(line["errors"]) == set(plain["errors"])
    assert found["speed_up"]["prinmix"]["error quotient"] == pytest.approx(1, abs=0.03)
    text = (tmp_path / "compression.md").read_text()
    assert text == markdown(found)
    assert "1 of 4" in text
    assert (tmp_path / "compression.png").stat().st_size > 10_000
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(
    "options",
    [["--shape", "cube"], ["--methods", "magic"], ["--ratio", "2"], ["--device", "abacus"]],
    ids=str,
)
def test_bad_options(options: list[str], tmp_path: Path) -> None:
    result = run(*options, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "error: " in result.output
    assert not (tmp_path / "out").exists()


def test_solvers_are_not_needed() -> None:
    """Compressing imports cvxpy only where SCIP is asked for."""
    program = (
        "import sys, torch, vllm_prinmix.compress.run, benchmarks.compression;"
        "from vllm_prinmix.compress.methods import registry;"
        "from vllm_prinmix.compress.quantization.hessian import Hessian;"
        "dw, hessian = torch.randn(64, 64), Hessian(torch.eye(64));"
        "registry.make('prinmix').compress(dw, hessian, 1000);"
        "registry.make('prinmix-paper', solver='exact').compress(dw, hessian, 1000);"
        "assert not {'cvxpy', 'pyscipopt'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
