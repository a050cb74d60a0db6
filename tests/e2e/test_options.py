"""`vllm serve` with options that do not fit: one clear message, exit code not 0, nothing loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo.pipeline import Family
from tests.format.deltas import write_small_delta


def serve(*arguments: str) -> str:
    """What `vllm serve` says before it gives up."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--deltas", "somewhere"), "--deltas is given but --enable-prinmix is not"),
        (("--enable-prinmix",), "--enable-prinmix is given but --deltas is not"),
        (("--enable-prinmix", "--deltas", "d", "--max-deltas", "0"), "--max-deltas]; found: 0"),
        (("--enable-prinmix", "--deltas", "nowhere"), "the folder of deltas does not exist"),
    ],
    ids=["no flag", "no deltas", "no slots", "no folder"],
)
def test_options_that_do_not_fit(family: Family, arguments: tuple[str, ...], message: str) -> None:
    assert message in serve(str(family.base), *arguments)


def test_deltas_of_another_base_only(family: Family, tmp_path: Path) -> None:
    write_small_delta(tmp_path / "foreign", "sha256:another")
    said = serve(str(family.base), "--enable-prinmix", "--deltas", str(tmp_path))
    assert "no servable delta" in said
    assert "belongs to another base model" in said


def test_help_shows_the_options() -> None:
    command = [str(Path(sys.executable).with_name("vllm")), "serve", "--help=PrinMix"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    for option in ("--enable-prinmix", "--deltas", "--max-deltas", "--max-cpu-deltas"):
        assert option in done.stdout
