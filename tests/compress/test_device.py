"""Compressing on a device other than the CPU: nothing of one is mixed with the other.

In processes of their own, see `tests.pretended_device`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compress.pairs import Pair
from vllm_prinmix.compress.inspection import describe

CASES = {
    "prinmix": [],
    "data-free": ["--calibration", "none"],
    "prinmix-paper": ["--method", "prinmix-paper", "--solver", "exact"],
    "delta-come": ["--method", "delta-come", "--delta-come-quirk"],
    "bitdelta": ["--method", "bitdelta", "--scale", "fitted", "--distill", "2"],
}
PROGRAM = """
import json, sys, torch
from tests import pretended_device
from transformers import PreTrainedModel
from vllm_prinmix.cli import app
torch.set_num_threads(1)
# A backward pass within another, which the engine does not do for a device in Python.
PreTrainedModel.gradient_checkpointing_enable = lambda *args, **kwargs: None
for arguments in json.load(sys.stdin):
    print(*arguments, flush=True)
    app(arguments, standalone_mode=False)
"""


def run(commands: list[list[object]]) -> None:
    """`prinmix` commands, one after the other in a process that has the device."""
    text = json.dumps(commands, default=str)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=text, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def test_compressing_is_as_good_as_on_the_cpu(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair, commands = make_pair(), []
    for case, options in CASES.items():
        texts = [] if "--calibration" in options else ["--calibration", pair.calibration]
        for device in ("pretended", "cpu"):
            inputs = ["--base", pair.base, "--finetuned", pair.finetuned, "--samples", "4", *texts]
            out = ["--out", tmp_path / f"{case}-{device}", "--device", device]
            commands.append(["compress", *inputs, *out, *options])
    run(commands)
    for case in CASES:
        there, here = (
            {module["name"]: module["report"]["error"] for module in describe(folder)["modules"]}
            for folder in (tmp_path / f"{case}-pretended", tmp_path / f"{case}-cpu")
        )
        assert there == pytest.approx(here, rel=0.3), case


def test_a_model_writes_its_calibration_there(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    inputs = ["--finetuned", make_pair().finetuned, "--out", out, "--samples", "3", "--tokens", "8"]
    run([["calibration", *inputs, "--device", "pretended"]])
    assert len(out.read_text().splitlines()) == 3


def test_mixed_devices_are_found() -> None:
    program = (
        "import torch; from tests import pretended_device; torch.ones(2, device='pretended') + torch.ones(2)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode
    assert "MixedDevices: aten.add.Tensor: [(2,)] with [(2,)] of the CPU" in result.stderr
