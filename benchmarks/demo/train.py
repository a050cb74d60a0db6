"""The demo's family of models, trained once and kept on disk.

    python -m benchmarks.demo.train --out build/demo/models

OUT/base and OUT/<task> are ordinary Hugging Face checkpoints in bfloat16. OUT/calibration/<task>.txt holds
one sample a line, OUT/test/<task>.jsonl the questions that neither training nor calibration contained,
OUT/training.json how the models were trained and what that took.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.demo.evaluate import exact_match
from benchmarks.demo.family import Settings, train_family
from benchmarks.demo.models import Shape
from benchmarks.demo.tasks import read_questions
from benchmarks.demo.training import Schedule, compute_dtype
from vllm_prinmix.errors import PrinMixError

DEMO_SHAPE = Shape()
LEARNED = 0.03  # nats per token: nearly all answers are right
# Muon learns text in fewer steps. The fine-tunes use AdamW, as fine-tunes do: its deltas have fewer strong
# directions than Muon's, whose updates weigh all directions alike.
DEMO_BASE = Schedule(steps=300, batch=8, rate=6e-3, muon=True)
DEMO_FINETUNES = {
    "reverse": Schedule(steps=330, batch=64, rate=1e-3, learned=LEARNED),
    "shift": Schedule(steps=160, batch=64, rate=1e-3, learned=LEARNED),
    "double": Schedule(steps=140, batch=64, rate=1e-3, learned=LEARNED),
}
REPORT = "training.json"
# Where the result comes from: a family made by other versions of these files is made anew.
SOURCES = ("corpus", "family", "models", "muon", "tasks", "tokenizer", "training")


def train_pair_family(
    folder: Path,
    *,
    seed: int = 0,
    shape: Shape = DEMO_SHAPE,
    base: Schedule = DEMO_BASE,
    finetunes: Mapping[str, Schedule] = DEMO_FINETUNES,
    questions: int = 256,
    samples: int = 256,
    dtype: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a base and full fine-tunes of it into ``folder``, unless it holds just these already.

    The arguments are those of `family.Settings`, the result that of `family.train_family`; without ``dtype``
    the CPU decides. A training that was cut short leaves nothing behind; a family of other settings or
    sources is replaced. Raises PrinMixError where ``folder`` holds something else.
    """
    settings = Settings(seed, shape, base, finetunes, questions, samples, dtype or compute_dtype())
    stamp = asdict(settings) | {"sources": _digest_of_sources()}
    if folder.exists() and any(folder.iterdir()):
        report = _read_report(folder)
        if report["settings"] == stamp:
            return report["models"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        models = train_family(made, settings, console)
        (made / REPORT).write_text(json.dumps({"settings": stamp, "models": models}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return models


def train_small_pair(
    folder: Path,
    *,
    architecture: str = "qwen2",
    tied: bool = False,
    hidden: int = 128,
    layers: int = 2,
    steps: int = 40,
    task: str = "reverse",
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """folder/base and one fine-tune of it, folder/<task>, in seconds: truly trained, though not for long.

    ``architecture`` is one of `models.ARCHITECTURES`, ``hidden`` a multiple of 64 (the head size), ``steps``
    those of each of the two. Caching and result are those of `train_pair_family`.
    """
    heads = hidden // 64
    shape = Shape(
        architecture=architecture,
        hidden=hidden,
        intermediate=3 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=max(1, heads // 2),
        tied=tied,
    )
    return train_pair_family(
        folder,
        seed=seed,
        shape=shape,
        base=Schedule(steps, batch=4, rate=6e-3, muon=True),
        finetunes={task: Schedule(steps, batch=32, rate=2e-3)},
        questions=64,
        samples=64,
        console=console,
    )


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        raise PrinMixError(
            "this folder is not one that the demo's training made",
            where=folder,
            found=f"no readable {REPORT}",
            expected="a folder that is empty, missing, or of an earlier training",
            fix="name another folder, or remove this one",
        ) from None


def _digest_of_sources() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()


def main(
    out: Annotated[Path, typer.Option(help="Where the models go.")] = Path("build/demo/models"),
    seed: Annotated[int, typer.Option(help="Of weights, data and their order.")] = 0,
) -> None:
    """Train the demo's base and fine-tunes, if they are not there yet, and show how good they are."""
    console = Console()
    try:
        models = train_pair_family(out, seed=seed, console=console)
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    base = models["base"]
    shown = Table(
        title=f"base: {base['held_out_loss']:.2f} nats per byte (unigram {base['unigram_loss']:.2f})"
    )
    for column in ("model", "steps", "CPU s", "s", "base right", "fine-tune right", "|dW|/|W|"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for name, model in models.items():
        cells = [f"{model['steps']}", f"{model['cpu_seconds']:.0f}", f"{model['wall_seconds']:.0f}"]
        if name != "base":
            questions = read_questions(out / "test" / f"{name}.jsonl")
            cells += [f"{100 * exact_match(out / which, questions):.1f} %" for which in ("base", name)]
            cells.append(f"{model['change']:.2f}")
        shown.add_row(name, *cells)
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
