"""What the server tests share: the demo's family of models, its deltas, and servers of them."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.demo import pipeline
from benchmarks.greedy import load_reference
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "build" / "demo"
LOGS = ROOT / "build" / "test-logs"
FLOAT32 = ("--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "base")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def demo_results(request: pytest.FixtureRequest) -> dict:
    """results.json of `make demo`, run as a user runs it."""
    if request.config.getoption("--reuse-demo"):
        return json.loads((DEMO / "results.json").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--out", str(DEMO)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((DEMO / "results.json").read_text())


@pytest.fixture(scope="session")
def family(demo_results: dict) -> pipeline.Family:
    """The demo's models and deltas."""
    return pipeline.find(DEMO)


@pytest.fixture(scope="session")
def prompts(family: pipeline.Family) -> list[list[int]]:
    """16 prompts as token ids: questions of every task, and source code of 40 to 300 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.base)
    texts = [tenant.questions[i].prompt for tenant in family.tenants for i in range(3)]
    source = inspect.getsource(json.decoder)
    draw = random.Random(0)
    found = [tokenizer.encode(text, add_special_tokens=False) for text in texts[:9]]
    code = tokenizer.encode(source, add_special_tokens=False)
    for length in (40, 90, 140, 180, 220, 260, 300):
        start = draw.randrange(len(code) - length)
        found.append(code[start : start + length])
    assert len(found) == 16
    return found


@pytest.fixture(scope="session")
def references(family: pipeline.Family) -> dict[str, torch.nn.Module]:
    """name -> transformers in float32 on the float32 merge; "base" too."""
    models = {tenant.name: load_reference(tenant.merged) for tenant in family.tenants}
    return {"base": load_reference(family.base), **models}


def prinmix_arguments(family: pipeline.Family, *more: str) -> tuple[str, ...]:
    return ("--enable-prinmix", "--deltas", str(family.deltas), *SMALL_MACHINE_ARGUMENTS, *more)


@pytest.fixture(scope="session")
def logs() -> Path:
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS


@pytest.fixture(scope="module")
def server(family: pipeline.Family, logs: Path):
    """float32, fewer slots and less host memory than tenants, prefix caching as by default."""
    arguments = prinmix_arguments(family, "--max-deltas", "2", "--max-cpu-deltas", "2", *FLOAT32)
    with VllmServer(family.base, *arguments, log=logs / "float32.log") as running:
        yield running
