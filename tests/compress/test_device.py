"""Compressing on a device other than the CPU: nothing of one is mixed with the other.

In processes of their own, see `tests.pretended_device`. What is for CUDA alone (`gpu_leaf`, TF32) is not run,
nor are layers run again in the backward pass of `--distill`.
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
# A backward pass that runs a layer again ends the process, for a device in Python.
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
        # Products are summed in another order; what is left of lm_head's is a hundred thousandth.
        there, here = (
            {module["name"]: module["report"]["error"] for module in describe(folder)["modules"]}
            for folder in (tmp_path / f"{case}-pretended", tmp_path / f"{case}-cpu")
        )
        assert there == pytest.approx(here, rel=0.05, abs=2e-5), case


def test_a_model_writes_its_calibration_there(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    inputs = ["--finetuned", make_pair().finetuned, "--out", out, "--samples", "3", "--tokens", "8"]
    run([["calibration", *inputs, "--device", "pretended"]])
    assert len(out.read_text().splitlines()) == 3


MIXED = {
    "there + here": "aten.add.Tensor",
    "there @ here": "aten.mm.default",
    "here[index]": "aten.index.Tensor",
    "there.index_select(0, index.cpu())": "aten.index_select.default",
    "there.index_put((index,), here)": "aten.index_put",
    "torch.cat([there, here])": "aten.cat.default",
}
ALLOWED = ["there[index.cpu()]", "there + torch.tensor(2.0)", "there.copy_(here)", "there.cpu() + here"]
CHECK = """
import torch
from tests import pretended_device
here = torch.ones(2, 2)
there = torch.ones(2, 2, device="pretended")
index = torch.tensor([1, 0], device="pretended")
assert there.to("meta").is_meta
for text in ALLOWED:
    eval(text)
for text, operation in MIXED.items():
    try:
        eval(text)
    except pretended_device.MixedDevices as error:
        assert str(error).startswith(operation), error
    else:
        raise AssertionError(text)
"""


def test_mixed_devices_are_found() -> None:
    program = f"MIXED, ALLOWED = {MIXED}, {ALLOWED}" + CHECK
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
