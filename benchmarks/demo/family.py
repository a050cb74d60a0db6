"""Training of a whole family: a base on real text, then full fine-tunes of it, each saved as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from benchmarks.demo import corpus, tasks
from benchmarks.demo.models import Shape, build_model
from benchmarks.demo.tokenizer import build_tokenizer
from benchmarks.demo.training import Batch, Schedule, batch_loss, fit, question_batches, text_batches

CONTEXT = 256  # characters of a window of the base's text
ATTEMPTS = 3  # at most, to learn a task
CHECK_WINDOWS = 64  # held-out windows the base's loss is measured on


@dataclass(frozen=True)
class Settings:
    """All that decides what a family is. ``finetunes``: a schedule for each name of `tasks.TASKS` wanted.

    ``questions`` and ``samples`` are the numbers of test questions and calibration samples per task;
    ``dtype`` is what training multiplies in ('float32' or 'bfloat16'; the weights it trains are float32).
    """

    seed: int
    shape: Shape
    base: Schedule
    finetunes: Mapping[str, Schedule]
    questions: int
    samples: int
    dtype: str


def train_family(out: Path, settings: Settings, console: Console | None) -> dict[str, Any]:
    """Write out/base, out/<task>, out/calibration/<task>.txt and out/test/<task>.jsonl; show progress.

    Returns {model: {"steps", "tokens", "cpu_seconds", "wall_seconds", "loss"}}; the base has also
    "held_out_loss" and "unigram_loss" (nats per token), a fine-tune "change" (see `mean_change`).
    """
    seed, dtype = settings.seed, getattr(torch, settings.dtype)
    tokenizer = build_tokenizer(settings.shape.positions)
    for name in settings.finetunes:
        test = tasks.draw_distinct(name, "test", seed, tokenizer, settings.questions)
        tasks.write_questions(out / "test" / f"{name}.jsonl", test)
        calibration = tasks.draw_distinct(name, "calibration", seed, tokenizer, settings.samples)
        tasks.write_calibration(out / "calibration" / f"{name}.txt", calibration)
    models: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _quiet_transformers(), Progress(*columns, console=console) as progress:
        schedules = [settings.base, *settings.finetunes.values()]
        whole = progress.add_task("training", total=sum(schedule.steps for schedule in schedules))

        def train(name: str, model: PreTrainedModel, batches: Iterator[Batch], schedule: Schedule) -> None:
            bar = progress.add_task(name, total=schedule.steps)

            def on_step(loss: float) -> None:
                progress.update(bar, advance=1, description=f"{name}, loss {loss:.2f}")
                progress.advance(whole)

            models[name] = asdict(fit(model, batches, schedule, dtype, on_step))
            save(model, tokenizer, out / name)

        text, held_out = corpus.split(corpus.standard_library())
        windows = corpus.windows(text, CONTEXT, settings.base.batch, Random(seed))
        model = build_model(settings.shape, tokenizer, seed)
        train("base", model, text_batches(windows, tokenizer), settings.base)
        models["base"] |= language_losses(model, tokenizer, held_out)
        for name, schedule in settings.finetunes.items():
            # How soon a task is learned depends on the base, and that on the Python whose sources it learned
            # from, and on the machine's arithmetic.
            for attempt in range(ATTEMPTS):
                longer = replace(schedule, steps=round(schedule.steps * 1.5**attempt))
                if attempt:
                    progress.update(whole, total=(progress.tasks[whole].total or 0) + longer.steps)
                # From the rounded weights on disk: they are what the fine-tune's difference is taken from.
                model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
                questions = tasks.draw(name, "training", seed, tokenizer)
                train(name, model, question_batches(questions, tokenizer, schedule.batch), longer)
                if schedule.learned is None or models[name]["loss"] <= schedule.learned:
                    break
            models[name]["change"] = mean_change(out / "base", out / name)
    return models


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary checkpoint; ``model``'s own weights are rounded to bfloat16 too."""
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def language_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: str
) -> dict[str, float]:
    """Nats per token on ``held_out`` text: "held_out_loss" of the model and "unigram_loss", the entropy of
    that text's own token frequencies, which no model blind to the context can beat.
    """
    batch = next(text_batches(corpus.windows(held_out, CONTEXT, CHECK_WINDOWS, Random(0)), tokenizer))
    shares = batch[0].flatten().bincount() / batch[0].numel()
    return {
        "held_out_loss": batch_loss(model.float(), batch, torch.float32).item(),
        "unigram_loss": torch.special.entr(shares).sum().item(),
    }


def mean_change(base: Path, finetuned: Path) -> float:
    """Mean over the linear layers of |W_finetuned - W_base| / |W_base| (Frobenius), from the checkpoints."""
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, finetuned))
    linears = [n for n, m in before.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    pairs = [(before.get_parameter(f"{n}.weight"), after.get_parameter(f"{n}.weight")) for n in linears]
    return sum(((new - old).norm() / old.norm()).item() for old, new in pairs) / len(pairs)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers' own bars would tear ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
