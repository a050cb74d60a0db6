"""Make all pairs and show how hard they are.

    python -m benchmarks.pairs --out build/pairs

Writes OUT/pairs.json: for each pair asked for its name, task, paths, and what `measure` measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.pairs.make import Pair, make_pairs
from benchmarks.pairs.recipes import RECIPES
from vllm_prinmix.errors import PrinMixError


def main(
    out: Annotated[Path, typer.Option(help="Where the pairs go.")] = Path("build/pairs"),
    models: Annotated[Path, typer.Option(help="The demo's models; trained where missing.")] = Path(
        "build/demo/models"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Only this pair; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Of the pairs' data and adapters; the base has its own.")] = 0,
) -> None:
    """Train the pairs that are not there yet, and show what makes them hard."""
    console = Console()
    try:
        if unknown := set(only or ()) - set(RECIPES):
            raise PrinMixError("there is no such pair", found=sorted(unknown), expected=", ".join(RECIPES))
        chosen = {name: RECIPES[name] for name in only or RECIPES}
        pairs = make_pairs(out, models, seed=seed, recipes=chosen, console=console)
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    (out / "pairs.json").write_text(
        json.dumps([asdict(pair) for pair in pairs], indent=1, default=str) + "\n"
    )
    console.print(table(pairs))
    console.print(f"Written to {out / 'pairs.json'}", highlight=False)


def table(pairs: list[Pair]) -> Table:
    """What was measured, for people."""
    shown = Table(
        title="Pairs of base and fine-tune",
        caption="base, tuned: exact match in %. dE, dHead: |dW|/|W| of embeddings and lm_head. Of the linear "
        "layers, mean: |dW|/|W|, stable rank of dW, energy of dW in its top 1/16 directions in %. Of their "
        "inputs, median: largest over median second moment of a channel, kurtosis (normal: 3).",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    cells = {
        "base": lambda m: f"{100 * m['exact_match_base']:.1f}",
        "tuned": lambda m: f"{100 * m['exact_match_finetuned']:.1f}",
        "|dW|/|W|": lambda m: f"{m['change']:.2f}",
        "dE": lambda m: f"{m['embedding_change']:.2f}",
        "dHead": lambda m: f"{m['head_change']:.2f}",
        "stable rank": lambda m: f"{m['stable_rank']:.1f}",
        "top 1/16": lambda m: f"{100 * m['top_energy']:.0f}",
        "peak": lambda m: f"{m['peak']:.0f}",
        "kurtosis": lambda m: f"{m['kurtosis']:.1f}",
    }
    for column in ("pair", "task", *cells):
        shown.add_column(column, justify="left" if column in ("pair", "task") else "right")
    for pair in pairs:
        shown.add_row(pair.name, pair.task, *(cell(pair.measured) for cell in cells.values()))
    return shown


if __name__ == "__main__":
    typer.run(main)
