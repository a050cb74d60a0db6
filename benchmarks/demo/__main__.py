"""`make demo`: one tiny base, three full fine-tunes, compressed to 1/16 and served together by vLLM.

Writes OUT/results.json: per tenant exact match of base, fine-tune and served delta; dense bytes (2 per
parameter of the whole checkpoint), packed bytes (the delta's weight file), their ratio, the ratio of the
linear layers alone, and whether all served tokens equal those of the merged checkpoint in transformers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks.demo import pipeline
from benchmarks.demo.ask import Answer, ask_all, exact_match
from benchmarks.demo.evaluate import exact_match as exact_match_of_checkpoint
from benchmarks.greedy import compare, load_reference
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from vllm_prinmix.compress.inspection import describe
from vllm_prinmix.errors import PrinMixError


def main(
    out: Annotated[Path, typer.Option(help="Where models, deltas and results go.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Of training and calibration.")] = 0,
) -> None:
    """Train (the first time), compress, serve, ask, and show the result."""
    console = Console()
    transformers_logging.disable_progress_bar()
    begin = time.monotonic()
    try:
        family = pipeline.make(out, seed, console)
        arguments = serve_arguments(family)
        console.rule("vllm serve")
        console.print(" ".join(["vllm serve", str(family.base), *arguments]), soft_wrap=True, highlight=False)
        questions = {tenant.name: tenant.questions for tenant in family.tenants}
        with VllmServer(family.base, *arguments, log=out / "server.log") as server:
            answers = ask_all(server.url, questions, "base")
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print("Comparing with transformers on the merged checkpoints\n")
    for tenant in family.tenants:
        question = tenant.questions[0]
        asked = question.messages[-1]["content"]
        console.print(
            f"  {tenant.name}: asked {asked}, to answer {question.answer}", highlight=False, markup=False
        )
    console.print()
    results = {"tenants": [measure(tenant, answers) for tenant in family.tenants]}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results))
    console.print(f"Written to {out / 'results.json'}; {time.monotonic() - begin:.0f} s in all.\n")
    show_next_steps(family, arguments, console)


def serve_arguments(family: pipeline.Family) -> list[str]:
    """Options of `vllm serve` for the demo."""
    return [
        "--served-model-name",
        "base",
        "--enable-prinmix",
        "--deltas",
        str(family.deltas),
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        *SMALL_MACHINE_ARGUMENTS,
    ]


def measure(tenant: pipeline.TenantFiles, answers: dict[str, dict[str, list[Answer]]]) -> dict[str, Any]:
    """One tenant's line of results.json."""
    served = answers["tenant"][tenant.name]
    reference = load_reference(tenant.merged)
    compared = compare(reference, [(a.prompt_ids, a.token_ids) for a in served])
    ratio = describe(tenant.delta)["ratio"]
    return {
        "name": tenant.name,
        "exact_match": {
            "base": exact_match(answers["base"][tenant.name], tenant.questions),
            "finetuned": exact_match_of_checkpoint(tenant.finetuned, tenant.questions),
            "served": exact_match(served, tenant.questions),
        },
        "dense_bytes": ratio["whole"]["dense_bytes"],
        "packed_bytes": ratio["whole"]["bytes"],
        "ratio": ratio["whole"]["ratio"],
        "ratio_linear": ratio["linear"]["ratio"],
        "tokens_equal": all(c.equal for c in compared),
    }


def table(results: dict[str, Any]) -> Table:
    """The results for people; exact match in percent, and whether the served tokens are the merged's."""
    shown = Table(
        title="Three fine-tunes of one base, served together from packed deltas",
        caption="base, tuned, served: exact match in %. dense, packed: MB of the whole checkpoint and delta, "
        "and their ratio; linears: of the linear layers alone. tokens: whether all served tokens equal those "
        "of transformers on the merged checkpoint, so that what served lacks is compression's.",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    columns = ["tenant", "base", "tuned", "served", "dense", "packed", "ratio", "linears", "tokens"]
    for column in columns:
        shown.add_column(column, justify="left" if column == "tenant" else "right")
    for tenant in results["tenants"]:
        match = tenant["exact_match"]
        shown.add_row(
            tenant["name"],
            *(f"{100 * match[key]:.1f}" for key in ("base", "finetuned", "served")),
            *(f"{tenant[key] / 1e6:.2f}" for key in ("dense_bytes", "packed_bytes")),
            *(f"1/{1 / tenant[key]:.1f}" for key in ("ratio", "ratio_linear")),
            "equal" if tenant["tokens_equal"] else "DIFFER",
        )
    return shown


def show_next_steps(family: pipeline.Family, arguments: list[str], console: Console) -> None:
    """How to do the same by hand."""
    tenant = family.tenants[0]
    body = json.dumps({"model": tenant.name, "messages": tenant.questions[0].messages, "temperature": 0})
    vllm = Path(sys.executable).with_name("vllm")
    shown = vllm.relative_to(Path.cwd()) if vllm.is_relative_to(Path.cwd()) else vllm
    console.print("Serve the same deltas yourself:\n", style="bold")
    text = f"VLLM_CPU_KVCACHE_SPACE=1 {shown} serve {family.base} {' '.join(arguments)}"
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print("\nand ask one of them:\n", style="bold")
    text = f"curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(f"\nThe right answer is {tenant.questions[0].answer}.", highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
