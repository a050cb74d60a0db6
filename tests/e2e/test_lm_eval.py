"""lm-evaluation-harness against a served tenant finds what our own evaluation finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo.ask import ask_all, exact_match
from benchmarks.demo.pipeline import Family
from benchmarks.lm_eval_tasks.make import questions
from benchmarks.server import VllmServer
from tests.e2e.conftest import ROOT


def lm_eval(server: VllmServer, model: str, task: str, tokenizer: Path, out: Path) -> float:
    """Exact match, 0 to 1, by the command that docs/benchmarks.md gives."""
    settings = {
        "model": model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 16,
    }
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in settings.items())]
    command += ["--apply_chat_template", "--include_path", "benchmarks/lm_eval_tasks", "--tasks", task]
    done = subprocess.run(
        [*map(str, command), "--output_path", str(out)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = out.rglob("results_*.json")
    return json.loads(results.read_text())["results"][task]["exact_match,none"]


@pytest.mark.parametrize("name", ["reverse", "double"], ids=["letters", "digits"])
def test_exact_match_is_the_same(server: VllmServer, family: Family, tmp_path: Path, name: str) -> None:
    asked = {name: questions(name)}
    answers = ask_all(server.url, asked, "base")
    for kind, model in (("tenant", name), ("base", "base")):
        ours = exact_match(answers[kind][name], asked[name])
        found = lm_eval(server, model, f"prinmix_{name}", family.base, tmp_path / kind)
        assert found == pytest.approx(ours), model
        assert found > 0.9 if kind == "tenant" else found < 0.05
