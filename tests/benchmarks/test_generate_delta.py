"""Generated deltas: sizes as real ones have them, and a format that reads back."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import generate_delta
from benchmarks.generate_delta import SHAPES, directions
from vllm_prinmix.compress.inspection import describe
from vllm_prinmix.format.delta import read_delta
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import Factors


@pytest.mark.parametrize(
    ("rows", "cols", "expected"), [(3584, 3584, 853), (512, 3584, 213), (18944, 3584, 1435)], ids=str
)
def test_as_many_directions_as_real_deltas_have(rows: int, cols: int, expected: int) -> None:
    classes = directions(rows, cols, Fraction(1, 16))
    count = sum(c.directions for c in classes)
    assert abs(count / expected - 1) < 0.02
    assert abs(sum(c.directions * c.v_bits for c in classes) / count - 2.1) < 0.02


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    import typer

    app = typer.Typer()
    app.command()(generate_delta.main)
    arguments = ["--out", str(tmp_path / "out"), "--shape", "tiny", "--count", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_what_is_written(generated: Path) -> None:
    folders = sorted((generated / "deltas").iterdir())
    assert [f.name for f in folders] == ["generated-00", "generated-01"]
    assert describe(folders[0])["ratio"]["linear"]["ratio"] <= 1 / 16
    first, second = (read_delta(folder) for folder in folders)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(first.tensors[name], second.tensors[name])
    spec = first.config.modules[name]
    assert isinstance(spec, Factors)
    dense = decode(spec, first.tensors[name]).dense()
    assert 1e-4 < float(dense.std()) < 1e-2
    assert abs(float(dense.mean())) < float(dense.std()) / 10


def test_linked_deltas(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(generate_delta.main)
    arguments = ["--out", str(tmp_path / "out"), "--shape", "tiny", "--count", "5", "--distinct", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    folders = sorted((tmp_path / "out" / "deltas").iterdir())
    assert len(folders) == 5
    files = {f.joinpath("delta.safetensors").stat().st_ino for f in folders}
    assert len(files) == 2
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = [read_delta(f).tensors[name] for f in folders]
    assert torch.equal(tensors[0], tensors[2])
    assert not torch.equal(tensors[0], tensors[1])


def test_shapes_are_those_of_the_models() -> None:
    """Parameters in billions, as published."""
    from transformers import AutoConfig

    from vllm_prinmix.compress.model import build_model, expected_tensors

    for name, billions in (("qwen2.5-0.5b", 0.494), ("qwen2.5-7b", 7.616), ("qwen2.5-14b", 14.770)):
        config = AutoConfig.for_model("qwen2", **vars(SHAPES[name]))
        shapes = [shape for _, shape in expected_tensors(build_model(config)).values()]
        total = sum(torch.Size(shape).numel() for shape in shapes)
        assert abs(total / 1e9 / billions - 1) < 0.001, name
