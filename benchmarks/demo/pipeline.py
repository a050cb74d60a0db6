"""From nothing to served deltas: train (cached), compress, merge. The demo and the tests use it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console

from benchmarks.demo.tasks import Question, read_questions
from benchmarks.demo.train import DEMO_FINETUNES, train_pair_family
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress

RATIO = Fraction(1, 16)
SAMPLES = 256  # calibration samples; they are short here, about 20 tokens each


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
    train_pair_family(out / "models", seed=seed, console=console)
    family = find(out)
    for tenant in family.tenants:
        for made_here in (tenant.delta, tenant.merged):
            shutil.rmtree(made_here, ignore_errors=True)
        console.rule(f"{tenant.name}: compress, merge")
        options = Options(
            base=str(family.base),
            finetuned=str(tenant.finetuned),
            out=tenant.delta,
            calibration=str(tenant.calibration),
            method=PrinMix(),
            ratio=RATIO,
            samples=SAMPLES,
            seed=seed,
        )
        compress(options, console)
        merge(str(family.base), tenant.delta, tenant.merged, "float32", False, console)
    return family


def find(out: Path) -> Family:
    """The family that `make` put, or will put, into ``out``; the questions are there after training."""
    models = out / "models"
    tenants = [
        TenantFiles(
            name=name,
            finetuned=models / name,
            calibration=models / "calibration" / f"{name}.txt",
            delta=out / "deltas" / name,
            merged=out / "merged" / name,
            questions=read_questions(models / "test" / f"{name}.jsonl"),
        )
        for name in DEMO_FINETUNES
    ]
    return Family(models / "base", out / "deltas", tenants)
