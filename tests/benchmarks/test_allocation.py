"""The allocation benchmark: small, it measures what it says; what it writes is whole."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import allocation, allocation_report
from benchmarks.generate_delta import SHAPES
from vllm_prinmix.compress.methods.paper import CANDIDATE_BITS


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(allocation.main)
    return CliRunner().invoke(app, arguments)


def test_what_is_written(tmp_path: Path) -> None:
    options = ["--sizes", "48,64", "--decays", "0.6", "--scip-pairs", "48", "--shape", "tiny"]
    result = run(*options, "--workers", "1", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "allocation.json").read_text())
    lines = found["compared"]
    assert [(x["problem"], x["size"], "scip" in x) for x in lines] == [
        ("eq8", 48, True),
        ("eq8", 64, True),
        ("pairs", 48, True),
        ("pairs", 64, False),
    ]
    for line in lines:
        assert line["exact"]["gap"] == 0
        if "scip" in line:
            assert abs(line["error_difference"]) < 1e-6
            assert line["speed_up"] == line["scip"]["seconds"] / line["exact"]["seconds"]
    for total in found["model"]["methods"]:
        assert total["modules"] == 7 * SHAPES["tiny"].num_hidden_layers
        assert total["largest_gap"] == 0
        assert total["solver_seconds"] <= total["wall_seconds"]
    text = (tmp_path / "allocation.md").read_text()
    assert text in result.output
    assert "| pairs (prinmix) | 64 |" in text
    assert (tmp_path / "allocation.png").stat().st_size > 10_000


def test_modules_of_a_7b_model() -> None:
    modules = allocation.modules(SHAPES["qwen2.5-7b"], seed=0)
    assert len(modules) == 196
    assert {(t.rows, t.cols) for t in modules} == {(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)}
    assert len({t.decay for t in modules}) == 196
    assert all(0.35 <= t.decay <= 1 for t in modules)


def test_tables_are_as_described() -> None:
    tables = allocation.Tables(400, 300, decay=0.5, seed=3)
    errors = tables.errors(CANDIDATE_BITS, 300, 0)
    assert errors.shape == (300, len(CANDIDATE_BITS))
    assert np.array_equal(errors, tables.errors(CANDIDATE_BITS, 300, 0))
    expected = (
        np.array([allocation.DISTORTION[b] for b in CANDIDATE_BITS]) / (1 + np.arange(300) / 4)[:, None]
    )
    logs = np.log(errors / expected)
    assert abs(logs.mean()) < 0.03
    assert logs.std() == pytest.approx(allocation.NOISE, rel=0.1)


def test_medians_and_extremes() -> None:
    def line(exact: float, scip: float, difference: float) -> dict[str, Any]:
        return {
            "problem": "eq8",
            "size": 256,
            "exact": {"seconds": exact, "gap": 0.0},
            "scip": {"seconds": scip, "gap": 0.0},
            "speed_up": scip / exact,
            "error_difference": difference,
        }

    (found,) = allocation_report.summary({"compared": [line(1, 50, 0), line(2, 60, -1e-9), line(3, 300, 0)]})
    assert (found["exact"], found["scip"], found["speed_up"]) == (2, 60, 50)
    assert (found["least_speed_up"], found["difference"], found["tables"]) == (30, 1e-9, 3)


def test_more_bytes_less_error_in_the_tables() -> None:
    solve = [allocation.Tables(96, 96, 0.6, 0).solver("eq8", Fraction(1, n))("exact") for n in (32, 16, 8)]
    assert solve[0].error > solve[1].error > solve[2].error


@pytest.mark.parametrize(
    "options",
    [
        ["--sizes", "a"],
        ["--sizes", "0"],
        ["--decays", "nan"],
        ["--ratio", "1/0"],
        ["--ratio", "2"],
        ["--shape", "nothing"],
    ],
    ids=str,
)
def test_bad_options(options: list[str], tmp_path: Path) -> None:
    result = run(*options, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "error: " in result.output
    assert not (tmp_path / "out").exists()
