"""Table, Markdown and plot of what `benchmarks.compression` measured; made from its result alone."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.records import write_file

# "factorise again": Cholesky factors of an H that this module had factorised before.
STAGES = (
    "activations",
    "load",
    "factorise",
    "factorise again",
    "svd",
    "simulate",
    "allocate",
    "quantize",
    "alternate",
    "report",
    "store",
)
PLAIN = ", straightforward"


def whole(results: dict[str, Any], name: str, *, without: str = "") -> dict[str, float]:
    """Seconds by stage of contender ``name``, scaled from its layers to the whole model."""
    line = results["contenders"][name]
    scale = results["layers"] / line["layers"]
    return {stage: scale * line["seconds"].get(stage, 0.0) for stage in STAGES if stage != without}


def speed_ups(results: dict[str, Any]) -> dict[str, Any]:
    """By method: the straightforward one's time and error / ours."""
    found: dict[str, Any] = {}
    for name, line in results["contenders"].items():
        plain = results["contenders"].get(name + PLAIN)
        if plain is None:
            continue
        ours, theirs = whole(results, name), whole(results, name + PLAIN)
        once = whole(results, name + PLAIN, without="factorise again")
        common = [module for module in plain["errors"] if module in line["errors"]]
        error, reference = (statistics.mean(x["errors"][m] for m in common) for x in (line, plain))
        found[name] = {
            "all": sum(theirs.values()) / sum(ours.values()),
            "all but factorise again": sum(once.values()) / sum(ours.values()),
            "cpu": plain["cpu_seconds"] / plain["layers"] * line["layers"] / line["cpu_seconds"],
            "stages": {stage: theirs[stage] / ours[stage] for stage in STAGES if ours[stage] > 0},
            "error": error,
            "straightforward error": reference,
            "error quotient": reference / error,
        }
    return found


def _rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """Header, then the lines of the table."""
    contenders, quicker = results["contenders"], results["speed_up"]
    header = ["seconds"]
    for name in contenders:
        header.append(name)
        if name.endswith(PLAIN):
            header.append("quotient")
    yield header
    stages = {name: whole(results, name) for name in contenders}
    for stage in (*STAGES, "all"):
        row = [stage]
        for name in contenders:
            seconds = sum(stages[name].values()) if stage == "all" else stages[name][stage]
            row.append(f"{seconds:.1f}" if seconds else "-")
            if name.endswith(PLAIN):
                found = quicker[name.removesuffix(PLAIN)]
                ratio = found["all"] if stage == "all" else found["stages"].get(stage)
                row.append(f"{ratio:.1f}x" if ratio and seconds else "-")
        yield row
    row = ["CPU seconds, all"]
    for name, line in contenders.items():
        row.append(f"{line['cpu_seconds'] * results['layers'] / line['layers']:.1f}")
        if name.endswith(PLAIN):
            row.append(f"{quicker[name.removesuffix(PLAIN)]['cpu']:.1f}x")
    yield row
    for title, text in (
        ("layers measured", lambda line: f"{line['layers']} of {results['layers']}"),
        ("peak memory, MB", lambda line: f"{line['peak_bytes'] / 1e6:.0f}"),
        ("peak GPU memory, MB", lambda line: f"{(line['gpu_peak_bytes'] or 0) / 1e6:.0f}"),
    ):
        if title.startswith("peak GPU") and not any(c["gpu_peak_bytes"] for c in contenders.values()):
            continue
        row = [title]
        for name, line in contenders.items():
            row.append(text(line))
            if name.endswith(PLAIN):
                row.append("")
        yield row


def notes(results: dict[str, Any]) -> list[str]:
    """What the figures mean."""
    machine = results["machine"]
    cores = f", {machine['threads']} threads" if "threads" in machine else ""
    lines = [
        f"{results['shape']}, linears at {results['ratio']}, {results['samples']} samples of "
        f"{results['tokens']} tokens; {machine['name']}{cores}. Random weights. Scaled from the layers "
        f"measured to all {results['layers']} layers; embeddings and the check of the checkpoints "
        "are left out. Every matrix has a budget of its own. CPU seconds: the time of all threads."
    ]
    for name, found in results["speed_up"].items():
        lines.append(
            f"{name}: {found['all']:.1f} times faster than the straightforward implementation (target: 5), "
            f"{found['all but factorise again']:.1f} times if that one factorised H once per matrix; "
            f"mean error on the same layers {found['error']:.5f}, straightforward "
            f"{found['straightforward error']:.5f} ({100 * found['error quotient'] - 100:+.2f} %)."
        )
    plain = "prinmix-paper" + PLAIN
    if plain in results["contenders"]:
        lines.append(
            f"Allocation: prinmix-paper by the solver exact, its straightforward one by "
            f"{results['solver'][plain]}; both of prinmix by the project's solver: nothing to compare."
        )
    return lines


def table(results: dict[str, Any]) -> Table:
    header, *rows = _rows(results)
    shown = Table(
        title="Compression of the whole model", caption="\n".join(notes(results)), caption_justify="left"
    )
    for i, column in enumerate(header):
        shown.add_column(column, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(results: dict[str, Any]) -> str:
    header, *rows = _rows(results)
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in lines)
        + "\n\n"
        + "\n\n".join(notes(results))
        + "\n"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """As PNG: one bar per contender, its stages stacked, in minutes for the whole model."""
    from matplotlib.figure import Figure

    names = list(results["contenders"])
    figure = Figure(figsize=(9, 1.4 + 0.6 * len(names)), layout="constrained")
    axis = figure.subplots()
    minutes = [{stage: s / 60 for stage, s in whole(results, name).items()} for name in names]
    left = [0.0] * len(names)
    for i, stage in enumerate(STAGES):
        widths = [line[stage] for line in minutes]
        axis.barh(names, widths, left=left, label=stage, color=f"C{i}" if i < 10 else "0.3")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, total in zip(names, left, strict=True):
        axis.annotate(f" {total:.1f}", (total, name), va="center")
    axis.invert_yaxis()
    axis.set_xlim(right=1.1 * max(left))
    axis.set_xlabel(f"minutes for all {results['layers']} layers, {results['machine']['name']}")
    axis.set_title(f"Compressing {results['shape']} to {results['ratio']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())
