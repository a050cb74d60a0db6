"""From nothing to served deltas: train (cached), compress, merge. The demo, the tests and the benchmarks use it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console

from benchmarks.demo.tasks import TASKS
from benchmarks.demo.train import train_pair_family
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods import Recipe
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress

RATIO = Fraction(1, 16)


@dataclass(frozen=True)
class Question:
    """One test prompt: the chat messages, the same as text, and the right answer."""

    messages: list[dict[str, str]]
    prompt: str
    answer: str


@dataclass(frozen=True)
class TenantFiles:
    """All that belongs to one tenant on disk."""

    name: str
    finetuned: Path
    calibration: Path
    delta: Path
    merged: Path  # base + delta in float32, an ordinary checkpoint
    questions: list[Question]


@dataclass(frozen=True)
class Family:
    """One base, its tenants, and the folder of their deltas."""

    base: Path
    deltas: Path
    tenants: list[TenantFiles]


def make(out: Path, seed: int, console: Console) -> Family:
    """Train what is not there yet, then compress every fine-tune at 1/16 and merge it, anew each time."""
    models = out / "models"
    train_pair_family(models, seed=seed)
    for made_here in ("deltas", "merged"):
        shutil.rmtree(out / made_here, ignore_errors=True)
    tenants = []
    for name in TASKS:
        tenant = TenantFiles(
            name=name,
            finetuned=models / name,
            calibration=models / "calibration" / f"{name}.txt",
            delta=out / "deltas" / name,
            merged=out / "merged" / name,
            questions=_questions(models / "test" / f"{name}.jsonl"),
        )
        console.rule(f"{name}: compress, merge")
        options = Options(
            base=str(models / "base"),
            finetuned=str(tenant.finetuned),
            out=tenant.delta,
            calibration=str(tenant.calibration),
            recipe=Recipe(),
            ratio=RATIO,
            seed=seed,
        )
        compress(options, console)
        merge(str(models / "base"), tenant.delta, tenant.merged, "float32", False, console)
        tenants.append(tenant)
    return Family(models / "base", out / "deltas", tenants)


def _questions(path: Path) -> list[Question]:
    return [Question(**json.loads(line)) for line in path.read_text().splitlines()]
