"""Making all pairs: each is trained once and kept on disk, with all that compression and evaluation need.

OUT/<pair>/ holds ``finetuned/``, ``calibration/in-domain.txt`` (questions with answers, one sample a line),
``calibration/pretraining.jsonl`` (field ``text``: windows of the base's kind of text that it was not trained
on), ``test.jsonl`` (questions that neither training nor calibration contained) and ``pair.json`` (how it was
trained, what was measured). With outliers it has its own ``base/``, with LoRA also ``adapter/``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.demo import corpus
from benchmarks.demo.evaluate import exact_match
from benchmarks.demo.family import CONTEXT
from benchmarks.demo.tasks import write_calibration, write_questions
from benchmarks.demo.train import REPORT as FAMILY_REPORT
from benchmarks.demo.train import train_pair_family
from benchmarks.demo.training import compute_dtype
from benchmarks.pairs import tasks
from benchmarks.pairs.measure import measure
from benchmarks.pairs.recipes import RECIPES, Recipe
from benchmarks.pairs.train import train
from vllm_prinmix.errors import PrinMixError

REPORT = "pair.json"
# Where a pair comes from: one that other versions of these files made is made anew. The recipe and the base
# are part of the settings.
SOURCES = ("lora", "make", "measure", "outliers", "tasks", "train")


@dataclass(frozen=True)
class Pair:
    """One pair on disk; all paths exist.

    ``measured``: "exact_match_base", "exact_match_finetuned" (0 to 1) and the fields of `measure.measure`.
    """

    name: str
    task: str
    base: Path
    finetuned: Path
    calibration: dict[str, Path]  # "in-domain" and "pretraining"
    questions: Path
    adapter: Path | None  # PEFT's format, where the fine-tune is a LoRA
    measured: dict[str, float]


def make_pairs(
    out: Path,
    models: Path,
    *,
    seed: int = 0,
    recipes: Mapping[str, Recipe] = RECIPES,
    questions: int = 256,
    samples: int = 256,
    dtype: str | None = None,
    console: Console | None = None,
) -> list[Pair]:
    """Train what is not in ``out`` yet, and the demo's family in ``models`` where there is none at all.

    ``questions`` and ``samples`` are the numbers of test questions and of samples in each calibration file;
    without ``dtype`` the CPU decides what training multiplies in. A pair of other settings, sources or
    another base is replaced; one cut short leaves nothing behind. Raises PrinMixError where ``models`` or
    a pair's folder holds something else.
    """
    if not models.exists():
        train_pair_family(models, seed=seed, console=console)
    family = _settings_of(models, FAMILY_REPORT)
    common = {"seed": seed, "questions": questions, "samples": samples, "dtype": dtype or compute_dtype()}
    common |= {"family": family, "sources": _digest_of_sources()}
    pairs = []
    transformers_logging.disable_progress_bar()  # its bars would tear ours
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, recipe in recipes.items():
            folder, stamp = out / name, common | {"recipe": asdict(recipe)}
            if _settings_of(folder, REPORT) != json.loads(json.dumps(stamp)):
                bar = progress.add_task(name, total=recipe.schedule.steps if recipe.schedule else 1)

                def on_step(loss: float, bar: Any = bar, name: str = name) -> None:
                    progress.update(bar, advance=1, description=f"{name}, loss {loss:.2f}")

                _make(folder, models, name, recipe, stamp, on_step)
                progress.update(bar, completed=progress.tasks[bar].total)
            measured = json.loads((folder / REPORT).read_text())["measured"]
            pairs.append(_find(folder, models, name, recipe, measured))
    return pairs


def _make(
    folder: Path,
    models: Path,
    name: str,
    recipe: Recipe,
    stamp: dict[str, Any],
    on_step: Callable[[float], None],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    seed, dtype = stamp["seed"], getattr(torch, stamp["dtype"])
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / name
        tokenizer = AutoTokenizer.from_pretrained(models / "base")
        found = _find(made, models, name, recipe, {})
        test = tasks.draw_distinct(recipe.task, "test", seed, tokenizer, stamp["questions"])
        samples = tasks.draw_distinct(recipe.task, "calibration", seed, tokenizer, stamp["samples"])
        write_questions(found.questions, test)
        write_calibration(found.calibration["in-domain"], samples)
        held_out = corpus.split(corpus.standard_library())[1]
        windows = next(corpus.windows(held_out, CONTEXT, stamp["samples"], Random(seed)))
        lines = "".join(json.dumps({"text": window}) + "\n" for window in windows)
        found.calibration["pretraining"].write_text(lines)
        trained = train(made, models / "base", recipe, seed, dtype, on_step) if recipe.schedule else None
        found = _find(made, models, name, recipe, {})
        measured = {f"exact_match_{w}": exact_match(getattr(found, w), test) for w in ("base", "finetuned")}
        measured |= measure(found.base, found.finetuned, [question.sample for question in samples])
        report = {"settings": stamp, "trained": trained, "measured": measured}
        (made / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _find(folder: Path, models: Path, name: str, recipe: Recipe, measured: dict[str, float]) -> Pair:
    return Pair(
        name=name,
        task=recipe.task,
        base=folder / "base" if recipe.outliers else models / "base",
        finetuned=folder / "finetuned" if recipe.schedule else models / recipe.task,
        calibration={
            "in-domain": folder / "calibration" / "in-domain.txt",
            "pretraining": folder / "calibration" / "pretraining.jsonl",
        },
        questions=folder / "test.jsonl",
        adapter=folder / "adapter" if recipe.lora else None,
        measured=measured,
    )


def _settings_of(folder: Path, report: str) -> dict[str, Any] | None:
    """The settings that a pair, or the demo's family, was made with; None where there is none yet."""
    if not folder.exists():
        return None
    try:
        return json.loads((folder / report).read_text())["settings"]
    except (OSError, ValueError, KeyError):
        raise PrinMixError(
            "this folder is not one that the training of models made",
            where=folder,
            found=f"no readable {report}",
            expected="a folder that is missing, or of an earlier run",
            fix="name another folder, or remove this one",
        ) from None


def _digest_of_sources() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()
