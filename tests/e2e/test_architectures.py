"""Qwen3, Llama and Mistral, tied and untied: train, compress, merge, serve with LLM, compare."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
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
from vllm_prinmix.compress.methods import Method, Recipe, Solver
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress


@pytest.mark.parametrize(
    ("architecture", "tied", "method"),
    [
        ("qwen3", True, Method.PRINMIX),
        ("llama", False, Method.PAPER),
        pytest.param("mistral", False, Method.PRINMIX, marks=pytest.mark.slow),
        pytest.param("qwen2", True, Method.PAPER, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else ("tied" if value else "untied"),
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
        recipe=replace(Recipe.of(method), solver=Solver.EXACT),
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
