"""The kernel benchmark: what its contenders compute is the same, and what it writes is whole."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import torch
import typer
from typer.testing import CliRunner

from benchmarks import kernels
from benchmarks.generate_delta import SHAPES
from tests.kernels.deltas import relative_error
from vllm_prinmix.format.payload import decode
from vllm_prinmix.kernels import native


def test_the_contenders_have_the_same_deltas() -> None:
    layer = kernels.Layer(SHAPES["tiny"], tenants=2, tokens=3, ratio=Fraction(1, 16), dense=True)
    for site, (x, columns) in enumerate(zip(layer.inputs, layer.columns, strict=True)):
        ours = native.linear(x, layer.packed[site], columns)
        for tenant, rows in enumerate(x.float().split(3)):
            parts = [rows @ decode(*coded).dense().T for coded in layer.coded[site][tenant]]
            assert relative_error(ours.split(3)[tenant], torch.cat(parts, dim=1)) < 1e-5
        dense = torch.bmm(x.view(2, 3, -1).float(), layer.dense[site].float().transpose(1, 2))
        assert relative_error(ours, dense.reshape(6, -1)) < 1e-2, "bfloat16 dW"


def test_what_is_written(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(kernels.main)
    arguments = ["--shape", "tiny", "--tenants", "1,2", "--tokens", "1,2", "--ratios", "1/16"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert [(line["tenants"], line["tokens"]) for line in found["layers"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for line in found["layers"]:
        assert set(line["seconds"]) == {"ours", "lora", "dense", "dequantize"}
        assert line["packed_bytes"] > 0
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    result = CliRunner().invoke(app, ["--shape", "nothing", "--out", str(tmp_path)])
    assert result.exit_code == 1
