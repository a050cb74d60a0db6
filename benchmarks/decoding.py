"""Time a token of decoding for the base and for tenants, beside a plain vLLM server of the same base.

    python -m benchmarks.decoding --shape qwen2.5-0.5b

Base and deltas are generated (benchmarks.generate_delta): right sizes, random numbers. The plain server runs
without the plugin at vLLM's defaults. The servers run one after the other, in --order; where one comes twice
the mean of its times counts and how far they lie apart shows how much the machine drifted. Written to --out:
decoding.json, decoding.png, the servers' logs, and the generated models, which are used again.
"""

from __future__ import annotations

import json
import platform
import statistics
import threading
import time
import urllib.request
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.generate_delta import SHAPES, generate, write_base
from benchmarks.kernels import processor
from benchmarks.records import write_file
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from vllm_prinmix import __version__
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint

TENANTS = 4
TENANT_NAMES = [f"generated-{i:02}" for i in range(TENANTS)]

# name -> the model that each of the requests is for
CASES = {
    "base": ["base"],
    "base x4": ["base"] * 4,
    "tenant": TENANT_NAMES[:1],
    "4 tenants": TENANT_NAMES,
    "tenant x4": TENANT_NAMES[:1] * 4,
}

# case -> (the plain server's case that it is measured against, what share of its speed it should reach)
TARGETS: dict[str, tuple[str, float | None]] = {
    "base": ("base", 0.95),
    "base x4": ("base x4", 0.95),
    "tenant": ("base", 0.70),
    "4 tenants": ("base x4", 0.60),
    "tenant x4": ("base x4", None),
}
MEMORY_TARGET = 1.15  # of a tenant's packed bytes
SKIPPED = 5  # first tokens, while requests are still arriving


def stream(url: str, model: str, prompt: list[int], tokens: int, times: list[float]) -> None:
    """Stream exactly ``tokens`` tokens; ``times`` gets when each of them came, in seconds."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b"data: {"):
                times.append(time.monotonic())


def decode(url: str, models: Sequence[str], tokens: int) -> list[list[float]]:
    """One request for each of ``models``, all at once: when the tokens of each came."""
    times: list[list[float]] = [[] for _ in models]
    threads = [
        threading.Thread(target=stream, args=(url, model, [5 + i, 6, 7, 8], tokens, times[i]))
        for i, model in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, found in zip(models, times, strict=True):
        if len(found) != tokens:
            raise PrinMixError("a stream ended early", where=model, found=len(found), expected=tokens)
    return times


def token_seconds(times: Sequence[Sequence[float]]) -> float:
    """Seconds a token takes while every stream runs: from the last one's start to the first one's end."""
    start, stop = max(t[SKIPPED] for t in times), min(t[-1] for t in times)
    inside = [[at for at in t if start <= at <= stop] for t in times]
    if any(len(t) < 2 for t in inside):
        raise PrinMixError("the streams do not overlap", fix="stream more tokens")
    return statistics.mean((t[-1] - t[0]) / (len(t) - 1) for t in inside)


def longest_gap(times: Sequence[Sequence[float]]) -> float:
    """The longest wait for a token after the first ones, in seconds."""
    return max(b - a for t in times for a, b in zip(t[SKIPPED:], t[SKIPPED + 1 :], strict=False))


def measure(server: VllmServer, prinmix: bool, tokens: int, repeats: int, bar: Progress) -> dict[str, Any]:
    """One server's figures: seconds per token (median) and longest gap of every case, resident bytes."""
    cases = {name: models for name, models in CASES.items() if prinmix or set(models) == {"base"}}
    task = bar.add_task("decoding", total=len(cases) * repeats)
    decode(server.url, ["base"], SKIPPED + 3)
    resident: list[int] = []
    for name in TENANT_NAMES if prinmix else ():
        decode(server.url, [name], SKIPPED + 3)
        resident.append(server.resident_bytes())
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gaps = dict.fromkeys(cases, 0.0)
    for models in cases.values():  # once to warm up: the first requests after a start are slower
        decode(server.url, models, SKIPPED + 15)
    for _ in range(repeats):
        for name, models in cases.items():
            times = decode(server.url, models, tokens)
            seconds[name].append(token_seconds(times))
            gaps[name] = max(gaps[name], longest_gap(times))
            bar.advance(task)
    return {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "all_seconds": seconds,
        "longest_gap": gaps,
        "resident_bytes": resident,
    }


def summarize(runs: Sequence[tuple[str, dict[str, Any]]], packed_bytes: int) -> dict[str, Any]:
    """What follows from the servers' figures: (plain or prinmix, `measure`) of each, in order."""
    found: dict[str, dict[str, list[float]]] = {"plain": {}, "prinmix": {}}
    for kind, run in runs:
        for name, value in run["seconds"].items():
            found[kind].setdefault(name, []).append(value)
    means = {kind: {n: statistics.mean(v) for n, v in cases.items()} for kind, cases in found.items()}
    cases = []
    for name, value in means["prinmix"].items():
        against, target = TARGETS[name]
        share = means["plain"][against] / value
        cases.append(
            {
                "case": name,
                "plain_ms": 1e3 * means["plain"][against],
                "prinmix_ms": 1e3 * value,
                "share": share,
                "target": target,
                "reached": None if target is None else share >= target,
            }
        )
    drift = max((max(v) / min(v) - 1 for kind in found.values() for v in kind.values()), default=0.0)
    resident: list[int] = next((run["resident_bytes"] for kind, run in runs if kind == "prinmix"), [])
    # The first tenant's growth has what all share in it: the kernels' working memory.
    per_tenant = (resident[-1] - resident[0]) / (len(resident) - 1) if len(resident) > 1 else None
    return {
        "cases": cases,
        "drift": drift,
        "packed_bytes": packed_bytes,
        "resident_bytes_per_tenant": per_tenant,
        "resident_share": per_tenant / packed_bytes if per_tenant is not None else None,
        "resident_target": MEMORY_TARGET,
    }


def table(summary: dict[str, Any]) -> Table:
    """One line per case."""
    memory = "memory of a tenant not known"
    if summary["resident_share"] is not None:
        memory = (
            f"a tenant: {summary['packed_bytes'] / 1e6:.1f} MB packed, resident memory grows by "
            f"{summary['resident_share']:.2f} of it (target {summary['resident_target']})"
        )
    shown = Table(title="Decoding", caption=f"{memory}; drift {100 * summary['drift']:.0f} %")
    for column in ("requests", "plain ms/token", "PrinMix ms/token", "share of speed", "target"):
        shown.add_column(column, justify="left" if column == "requests" else "right")
    for case in summary["cases"]:
        target = "-" if case["target"] is None else f"{100 * case['target']:.0f} %"
        colour = {None: "", True: "green", False: "red"}[case["reached"]]
        share = f"{100 * case['share']:.0f} %"
        shown.add_row(
            case["case"],
            f"{case['plain_ms']:.1f}",
            f"{case['prinmix_ms']:.1f}",
            f"[{colour}]{share}[/{colour}]" if colour else share,
            target,
        )
    return shown


def plot(summary: dict[str, Any], path: Path) -> None:
    """Time per token of every case beside the plain server's, as PNG."""
    import io

    from matplotlib.figure import Figure

    cases = summary["cases"]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for shift, key, label in ((-0.2, "plain_ms", "plain vLLM, base"), (0.2, "prinmix_ms", "PrinMix")):
        places = [i + shift for i in range(len(cases))]
        bars = axis.bar(places, [case[key] for case in cases], width=0.4, label=label)
        if key == "prinmix_ms":
            axis.bar_label(bars, [f"{100 * case['share']:.0f} %" for case in cases], fontsize=8)
    axis.set_xticks(range(len(cases)), [case["case"] for case in cases])
    axis.set(ylabel="ms per token", title="Decoding (share of the plain server's speed)")
    axis.margins(y=0.15)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    axis.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())


def models(folder: Path, shape: str) -> int:
    """Generate base and deltas in ``folder`` where they are not yet: packed bytes of one delta."""
    if not folder.exists():
        write_base(folder / "base", SHAPES[shape])
        for i, name in enumerate(TENANT_NAMES):
            base = Checkpoint(folder / "base", weights=False)
            generate(folder / "deltas" / name, base, Fraction(1, 16), seed=i)
    return sum(file.stat().st_size for file in (folder / "deltas" / TENANT_NAMES[0]).glob("*.safetensors"))


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen2.5-0.5b",
    order: Annotated[str, typer.Option(help="Servers, one after the other.")] = "plain,prinmix,plain",
    tokens: Annotated[int, typer.Option(min=20, help="Streamed per request.")] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Of each case, on each server.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("build/decoding"),
) -> None:
    """Measure and show."""
    console = Console()
    kinds = order.split(",")
    common = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "1024"]
    common += ["--served-model-name", "base", *SMALL_MACHINE_ARGUMENTS]
    runs: list[tuple[str, dict[str, Any]]] = []
    try:
        if shape not in SHAPES:
            raise PrinMixError("unknown shape", where="--shape", found=shape, expected=", ".join(SHAPES))
        if set(kinds) != {"plain", "prinmix"}:
            raise PrinMixError("wrong servers", where="--order", found=order, expected="plain and prinmix")
        folder = out / shape
        packed_bytes = models(folder, shape)
        with Progress(console=console) as bar:
            task = bar.add_task("servers", total=len(kinds))
            for number, kind in enumerate(kinds):
                ours = ("--enable-prinmix", "--deltas", str(folder / "deltas")) if kind == "prinmix" else ()
                with VllmServer(
                    folder / "base",
                    *ours,
                    *common,
                    log=out / f"server-{number}-{kind}.log",
                    environment={} if ours else {"VLLM_PLUGINS": "none"},
                    start_seconds=900,
                ) as server:
                    runs.append((kind, measure(server, bool(ours), tokens, repeats, bar)))
                bar.advance(task)
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    summary = summarize(runs, packed_bytes)
    results = {
        "version": __version__,
        "machine": {"processor": processor(), "system": platform.platform()},
        "shape": shape,
        "tokens": tokens,
        "summary": summary,
        "runs": [{"server": kind, **run} for kind, run in runs],
    }
    write_file(out / "decoding.json", json.dumps(results, indent=1).encode() + b"\n")
    plot(summary, out / "decoding.png")
    console.print(table(summary))
    console.print(f"Written to {out / 'decoding.json'} and {out / 'decoding.png'}.", markup=False)


if __name__ == "__main__":
    typer.run(main)
