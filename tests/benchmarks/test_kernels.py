"""The kernel benchmark: what its contenders compute is the same, and what it writes is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import kernel_report, kernels
from benchmarks.contenders_cpu import Layer
from benchmarks.layer import Case
from tests.kernels.deltas import relative_error
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels import native

ROOT = Path(__file__).parents[2]


def test_the_contenders_have_the_same_deltas() -> None:
    layer = Layer(Case("tiny", tenants=2, tokens=3, ratio=Fraction(1, 16)), dense=True)
    for site, (x, columns) in enumerate(zip(layer.inputs, layer.columns, strict=True)):
        ours = native.linear(x, layer.packed[site], columns)
        for tenant, rows in enumerate(x.float().split(3)):
            parts = [rows @ module.quantized().dense().T for module in layer.modules[site][tenant]]
            assert relative_error(ours.split(3)[tenant], torch.cat(parts, dim=1)) < 1e-5
        dense = torch.bmm(x.view(2, 3, -1).float(), layer.dense[site].float().transpose(1, 2))
        assert relative_error(ours, dense.reshape(6, -1)) < 1e-2, "bfloat16 dW"


def test_the_contenders_on_a_gpu_compute_the_same() -> None:
    """Ours and vLLM's LoRA kernels, interpreted; every copy of what they read."""
    command = [sys.executable, "-m", "tests.benchmarks.contenders_interpreted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name.split()[0] for name in found} == {"ours", "dense", "lora", "dequantize"}
    assert all(error < 5e-3 for error in found.values()), found
    assert found["ours 0"] == found["ours 1"]


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(kernels.main)
    return CliRunner().invoke(app, arguments)


def test_what_is_written(tmp_path: Path) -> None:
    options = ["--tenants", "1,2", "--tokens", "1,2", "--ratios", "1/16", "--out", str(tmp_path)]
    result = run("--device", "cpu", "--shape", "tiny", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["machine"]["device"] == "cpu"
    assert [(line["tenants"], line["tokens"]) for line in found["layers"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for line in found["layers"]:
        assert set(line["seconds"]) == {"ours", "lora", "dense", "dequantize"}
        assert line["packed_bytes"] > 0
        assert line["speed_up"]["dense"] == line["seconds"]["dense"] / line["seconds"]["ours"]
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "options",
    [
        ["--shape", "nothing"],
        ["--device", "abacus"],
        ["--tenants", "0"],
        ["--tokens", "a"],
        ["--ratios", "1/0"],
        ["--ratios", "2"],
    ],
    ids=str,
)
def test_bad_options(options: list[str], tmp_path: Path) -> None:
    result = run("--device", "cpu", *options, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "error: " in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(PrinMixError, match="no GPU"):
        kernels.pick_device("cuda")
    assert kernels.pick_device("").type == "cpu"


class CannedBench:
    """What a GPU might answer: times that only have to be plausible, with gaps."""

    copy_bytes_per_second = 3e12

    def measure(self, case: Case) -> dict[str, Any]:
        packed = 29e6 * case.tenants * 16 * float(case.ratio)
        work = 1e-5 + packed / 2e12 * (1 + case.rows / 2000)
        line: dict[str, Any] = {
            "packed_bytes": packed,
            "seconds": {"ours": work, "base": 2e-4 + case.rows * 7e-7, "lora": 6 * work},
            "failed": {},
            "notes": {"lora": "ranks 896, 896, 1472, 1472"},
            "errors": {"ours": 0.004, "lora": 0.003},
        }
        line["seconds"]["base_and_ours"] = line["seconds"]["base"] + work
        if case.tenants < 64:
            line["seconds"] |= {"dense": 9 * work, "dequantize": 60 * work}
        else:
            line["failed"] = {"dense": "needs 34.8 GiB", "dequantize": "the 150 s for all cases were over"}
        if case.tokens == 512 and case.tenants == 64:
            line = {"seconds": {}, "failed": {"ours": "OutOfMemoryError: CUDA out of memory"}, "errors": {}}
        return line


def canned() -> dict[str, Any]:
    cases = kernels.parse_cases("qwen2.5-7b,qwen2.5-14b", "1,4,16,64", "1,8,512", "1/16,1/32")
    return {
        "machine": {"device": "cuda", "name": "no GPU, invented figures"},
        "copy_bytes_per_second": CannedBench.copy_bytes_per_second,
        "layers": kernels.run(CannedBench(), cases),
    }


def test_report_of_a_gpu(tmp_path: Path) -> None:
    results = canned()
    console = Console(width=160, record=True, file=(tmp_path / "table").open("w"))
    console.print(kernel_report.table(results))
    text = console.export_text()
    assert "with base" in text
    assert "9.0x" in text
    # A line for each reason, not for each case.
    reasons = kernel_report.reasons(results)
    assert len(reasons) == 4
    assert any("and 3 more" in text for text in reasons)
    kernel_report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 50_000


def test_what_computes_something_else_is_a_failure() -> None:
    class Wrong(CannedBench):
        def measure(self, case: Case) -> dict[str, Any]:
            return {**super().measure(case), "errors": {"ours": float("nan")}}

    (line,) = kernels.run(Wrong(), [Case("tiny", 1, 1, Fraction(1, 16))])
    assert "differ" in line["failed"]["ours"]


def test_nothing_goes_on_after_the_device_is_lost() -> None:
    class Lost(CannedBench):
        def measure(self, case: Case) -> dict[str, Any]:
            if case.tenants == 2:
                raise PrinMixError("the device does not work any more")
            return super().measure(case)

    lines = kernels.run(Lost(), [Case("tiny", n, 1, Fraction(1, 16)) for n in (1, 2, 3)])
    assert len(lines) == 2
    assert not lines[1]["seconds"]
    assert kernel_report.reasons({"layers": lines})


def test_solvers_are_not_needed() -> None:
    """A machine with a GPU may have neither cvxpy nor SCIP."""
    program = (
        "import sys; sys.modules['cvxpy'] = sys.modules['pyscipopt'] = None;"
        "import benchmarks.kernels, benchmarks.generate_delta, benchmarks.bench_gpu"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
