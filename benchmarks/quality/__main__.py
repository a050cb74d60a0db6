"""Make the paper's quality tables from any pair of a base and a fine-tune.

    python -m benchmarks.quality --table 2 --base BASE --finetuned FINETUNED --calibration TEXT \\
        --questions Q.jsonl
    python -m benchmarks.quality --table all --pairs demo

Every figure is the mean over calibration seeds, with its standard deviation in brackets. Finished runs are
kept in OUT/results.jsonl and not made again, whichever table asks for them. Written to --out: quality.json,
quality.md, a picture of each table. docs/quality.md says what the columns are.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging
from typer import Option

from benchmarks.kernels import processor
from benchmarks.quality.arguments import (
    choose_methods,
    choose_pairs,
    choose_tables,
    fraction,
    numbers,
    words,
)
from benchmarks.quality.figures import Filled, average, fill
from benchmarks.quality.material import Limits
from benchmarks.quality.pairs import Pair
from benchmarks.quality.plots import plot
from benchmarks.quality.report import as_json, grid, markdown
from benchmarks.quality.runner import measure
from benchmarks.quality.tables import SAME, TABLES, Choice, Table, settings_of
from benchmarks.records import write_file
from vllm_prinmix import __version__
from vllm_prinmix.compress.prepare import pick_device
from vllm_prinmix.errors import PrinMixError

FILE_WIDTH = 150  # of tables in a file


def main(
    table: Annotated[str, Option(help=f"all, or of {', '.join([*TABLES, *SAME])}, comma-separated.")] = "all",
    base: Annotated[str | None, Option(help="Base checkpoint.")] = None,
    finetuned: Annotated[str | None, Option(help="Fine-tuned checkpoint.")] = None,
    calibration: Annotated[str | None, Option(help="Texts as for `prinmix compress`.")] = None,
    calibration_other: Annotated[str | None, Option(help="Of another domain, for table 11.")] = None,
    questions: Annotated[str | None, Option(help="Questions with answers, JSON lines.")] = None,
    heldout: Annotated[str | None, Option(help="Without questions: texts to measure on.")] = None,
    lora: Annotated[str | None, Option(help="Table 6: a LoRA fine-tune, merged into a checkpoint.")] = None,
    pairs: Annotated[str | None, Option(help="In place of these: demo, or a JSON list of pairs.")] = None,
    only: Annotated[str | None, Option(help="Of --pairs, those of these names, comma-separated.")] = None,
    methods: Annotated[str | None, Option(help="Comma-separated; default: all.")] = None,
    ratio: Annotated[str, Option(help="Of the tables that have one ratio.")] = "1/16",
    ratios: Annotated[str, Option(help="Of table 9.")] = "3/16,1/8,1/16,1/32",
    seeds: Annotated[str, Option(help="Of the calibration samples.")] = "0,1,2",
    samples: Annotated[int, Option(help="Calibration samples, but in table 10.")] = 128,
    sequence_length: Annotated[int, Option(help="The longest sample.")] = 2048,
    embeddings: Annotated[str, Option(help="Ratio of embeddings and lm_head, or `exact`.")] = "1/4",
    limit: Annotated[int, Option(help="Only the first so many questions; 0: all.")] = 0,
    tokens: Annotated[int, Option(help="At most, that errors and KL are measured on.")] = 8192,
    exact_match: Annotated[bool, Option(help="Let the model answer the questions.")] = True,
    device: Annotated[str, Option(help="auto: cuda where there is one, else cpu.")] = "auto",
    out: Annotated[Path, Option(help="Where results go, and come from.")] = Path("build/quality"),
) -> None:
    """Make the tables, from what is there and what is not yet."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    transformers_logging.disable_progress_bar()
    start = time.monotonic()
    try:
        given = {
            "calibration_other": calibration_other, "questions": questions, "heldout": heldout, "lora": lora
        }  # fmt: skip
        chosen = choose_pairs(pairs, only, base, finetuned, calibration, given)
        names = choose_tables(table)
        choice = Choice(choose_methods(methods), fraction(ratio), tuple(map(fraction, words(ratios))))
        limits = Limits(
            device=pick_device(device),
            samples=samples,
            sequence_length=sequence_length,
            embedding_ratio=None if embeddings == "exact" else fraction(embeddings),
            questions=limit,
            tokens=tokens,
            exact_match=exact_match,
        )
        filled: dict[str, list[Filled]] = {name: [] for name in names}
        notes: dict[str, list[str]] = {}
        for pair in chosen:
            tables = [make(name, choice, pair) for name in names]
            results = measure(pair, settings_of(tables), numbers(seeds), limits, out, console)
            for name, each in zip(names, tables, strict=True):
                filled[name] += fill(each, results, pair.name)
            if results.notes:
                notes[pair.name] = sorted(results.notes)
        shown = [t for name in names for t in [*filled[name], *_averages(filled[name])]]
        for part in shown:
            console.print(grid(part), markup=False)
        for name in names:
            plot([*filled[name], *_averages(filled[name])], out / f"table-{name}.png")
        write(out, shown, notes, limits, time.monotonic() - start)
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from what is finished", style="bold")
        raise typer.Exit(130) from None
    console.print(f"Written to {out}; {time.monotonic() - start:.0f} s in all.", markup=False)


def make(name: str, choice: Choice, pair: Pair) -> Table:
    """Table ``name`` of ``pair``."""
    return replace(TABLES[SAME.get(name, name)](choice, pair), name=name)


def write(
    out: Path, shown: list[Filled], notes: dict[str, list[str]], limits: Limits, seconds: float
) -> None:
    """quality.json and quality.md."""
    command = shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    machine = {"processor": processor(), "system": platform.platform(), "device": limits.device.type}
    if limits.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(limits.device)
    results: dict[str, Any] = {
        "command": command,
        "versions": {
            "vllm-prinmix": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "machine": machine,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "tables": [as_json(each) for each in shown],
        "warnings": notes,
    }
    write_file(out / "quality.json", json.dumps(results, indent=1).encode() + b"\n")
    page = [f"    {command}", "", f"On {machine.get('gpu', machine['processor'])}.", ""]
    write_file(out / "quality.md", "\n".join([*page, *map(markdown, shown)]).encode())


def _averages(tables: list[Filled]) -> list[Filled]:
    """The mean over pairs of each part, where there are several."""
    parts: dict[str, list[Filled]] = {}
    for each in tables:
        parts.setdefault(each.part, []).append(each)
    return [average(same) for same in parts.values() if len(same) > 1]


if __name__ == "__main__":
    typer.run(main)
