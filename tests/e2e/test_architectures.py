"""Qwen3, Llama and Mistral, tied and untied: train, compress, merge, serve with LLM, compare."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.demo.tasks import read_questions
from benchmarks.demo.train import train_small_pair
from benchmarks.greedy import compare, load_reference
from tests.e2e.conftest import ROOT
from tests.e2e.test_offline import SCRIPT
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress


@pytest.mark.parametrize(
    ("architecture", "tied", "method"),
    [
        ("qwen3", True, PrinMix()),
        ("llama", False, Paper(solver="exact")),
        pytest.param("mistral", False, PrinMix(), marks=pytest.mark.slow),
        pytest.param("qwen2", True, Paper(solver="exact"), marks=pytest.mark.slow),
    ],
    ids=lambda value: ("tied" if value else "untied") if isinstance(value, bool) else str(value),
)
def test_served_equals_merged(architecture: str, tied: bool, method: Method, tmp_path: Path) -> None:
    """A looser ratio than 1/16: so small a model's layers hardly hold a direction below it."""
    models = ROOT / "build" / "test-models" / f"{architecture}-{'tied' if tied else 'untied'}"
    console = Console(quiet=True)
    train_small_pair(models, architecture=architecture, tied=tied, console=console)
    base, delta, merged = models / "base", tmp_path / "deltas" / "reverse", tmp_path / "merged"
    options = Options(
        base=str(base),
        finetuned=str(models / "reverse"),
        out=delta,
        calibration=str(models / "calibration" / "reverse.txt"),
        method=method,
        ratio=Fraction(1, 8),
    )
    compress(options, console)
    merge(str(base), delta, merged, "float32", False, console)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = read_questions(models / "test" / "reverse.jsonl")[:8]
    prompts = [tokenizer.encode(q.prompt, add_special_tokens=False) for q in questions]
    script, asked, out = tmp_path / "offline.py", tmp_path / "prompts.json", tmp_path / "out.json"
    script.write_text(SCRIPT)
    asked.write_text(json.dumps(prompts))
    command = [sys.executable, *map(str, (script, base, delta.parent, asked, out))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(out.read_text())
    tokens = {}
    for name, checkpoint in (("base", base), ("reverse", merged)):
        own = [(prompt, ids) for model, prompt, ids in answers if model == name]
        assert len(own) == len(prompts)
        assert all(c.equal for c in compare(load_reference(checkpoint), own)), name
        tokens[name] = [ids for _, ids in own]
    assert tokens["base"] != tokens["reverse"], "the tenant answers like the base: nothing was shown"
