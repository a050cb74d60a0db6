"""Measure a server of many tenants under open-loop Poisson arrivals.

    python -m benchmarks.arrival_rate --url http://localhost:8000 --rate 0.5 --popularity zipf:1.5

Writes to --out: trace.jsonl (before the first request is sent), results.jsonl (one line per request),
report.json and report.png. benchmarks.trace, benchmarks.replay and benchmarks.report do the work.
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from benchmarks.records import (
    Trace,
    TraceSettings,
    read_trace,
    validated,
    write_file,
    write_results,
    write_trace,
)
from benchmarks.replay import check_served, list_models, pick_tenants, replay
from benchmarks.report import Report, plot, summarize, table
from benchmarks.trace import make_trace
from vllm_prinmix.errors import PrinMixError

# Options that only say how to make a trace, and mean nothing beside --trace.
TRACE_OPTIONS = (*TraceSettings.model_fields, "include_base")


def measure(trace: Trace, url: str, out: Path, *, timeout_s: float = 600.0) -> Report:
    """Replay ``trace`` against ``url`` and write results.jsonl, report.json and report.png under ``out``."""
    results = asyncio.run(replay(trace, url, timeout_s=timeout_s))
    write_results(out / "results.jsonl", results)
    report = summarize(results)
    write_file(out / "report.json", report.model_dump_json(indent=2).encode() + b"\n")
    plot(results, out / "report.png")
    return report


def main(
    context: typer.Context,
    url: Annotated[str, Option(help="The server's address.")] = "http://localhost:8000",
    rate: Annotated[float, Option(help="Mean arrivals, requests/s.")] = 0.5,
    popularity: Annotated[str, Option(help="uniform, or zipf:ALPHA.")] = "uniform",
    duration: Annotated[float, Option(help="Length of the trace, s.")] = 100.0,
    prompt_tokens: Annotated[int, Option(help="Tokens of each prompt.")] = 512,
    output_tokens: Annotated[int, Option(help="Tokens of each answer.")] = 1,
    vocab_size: Annotated[int, Option(help="Prompts hold random token ids below this.")] = 256,
    seed: Annotated[int, Option(help="Seed of the trace.")] = 0,
    tenants: Annotated[str, Option(help="Models to send to, a,b,...; default: those with a parent.")] = "",
    include_base: Annotated[bool, Option("--include-base", help="Send to the base model too.")] = False,
    trace: Annotated[Path | None, Option(help="Replay this trace file instead of making one.")] = None,
    timeout: Annotated[float, Option(help="A request fails after this long, s.")] = 600.0,
    out: Annotated[Path, Option(help="Folder for what is written.")] = Path("build/arrival_rate"),
) -> None:
    """Send Poisson arrivals over a server's tenants and report throughput, E2E and time to first token."""
    console = Console()
    try:
        given = [name for name in TRACE_OPTIONS if _is_given(context, name)]
        if trace is not None and given:
            raise PrinMixError(
                "a trace file holds its own settings",
                where=f"--trace {trace}",
                found=", ".join("--" + name.replace("_", "-") for name in given),
                fix="leave those options out, or leave --trace out to make a new trace",
            )
        models = asyncio.run(list_models(url))
        if trace is None:
            names = [name for name in map(str.strip, tenants.split(",")) if name]
            settings = validated(
                TraceSettings,
                {
                    "tenants": names or pick_tenants(models, include_base),
                    "rate": rate,
                    "popularity": popularity,
                    "duration": duration,
                    "prompt_tokens": prompt_tokens,
                    "output_tokens": output_tokens,
                    "vocab_size": vocab_size,
                    "seed": seed,
                },
                where="the options",
            )
            trace = out / "trace.jsonl"
            write_trace(trace, settings, make_trace(settings))
        loaded = read_trace(trace)
        check_served(models, loaded.settings.tenants)
        console.print(f"{len(loaded.requests)} requests in {trace}, sha256 {loaded.sha256}", soft_wrap=True)
        report = measure(loaded, url, out, timeout_s=timeout)
        console.print(table(report))
        console.print(f"Written to {out}: results.jsonl, report.json, report.png", soft_wrap=True)
        if not report.run.completed:
            raise PrinMixError("no request was completed", where=url, found=next(iter(report.failures)))
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


if __name__ == "__main__":
    typer.run(main)
