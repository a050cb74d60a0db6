"""Table and plot of what `benchmarks.kernels` measured; made from its result alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.records import write_file

NAMES = {
    "ours": "packed (ours)",
    "dense": "dense bf16 dW",
    "lora": "bf16 factors",
    "dequantize": "dequantize, then product",
    "base": "base layer alone",
}
OTHERS = ("dense", "lora", "dequantize")


def table(results: dict[str, Any]) -> Table:
    """One line per case."""
    machine = results["machine"]
    on_gpu = machine["device"] != "cpu"
    where = machine["name"] if on_gpu else f"threads: {machine['threads']}"
    shown = Table(
        title=f"The deltas of one decoder layer, {where}",
        caption="dense, LoRA, dequantize: their time / ours; copy: "
        f"{results['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        + ("; with base: base layer and deltas / base layer" if on_gpu else ""),
    )
    columns = ["shape", "ratio", "tenants", "tokens", "ms", "GB/s", "of copy", "dense", "LoRA", "dequantize"]
    for column in [*columns, "with base"] if on_gpu else columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for line in results["layers"]:
        row = [line["shape"], line["ratio"], str(line["tenants"]), str(line["tokens"])]
        if "ours" in line["seconds"]:
            row += [
                f"{1e3 * line['seconds']['ours']:.3g}",
                f"{line['bytes_per_second'] / 1e9:.{1 if line['bytes_per_second'] < 1e11 else 0}f}",
                f"{100 * line['share_of_copy']:.0f} %",
            ]
        else:
            row += ["-"] * 3
        faster = line.get("speed_up", {})
        row += [f"{faster[name]:.1f}x" if name in faster else "-" for name in OTHERS]
        if on_gpu:
            row.append(f"{line['with_base']:.2f}x" if "with_base" in line else "-")
        shown.add_row(*row)
    return shown


def reasons(results: dict[str, Any]) -> list[str]:
    """Why figures are missing, and what else is to know: a line for each contender and reason."""
    cases: dict[tuple[str, str], list[str]] = {}
    for line in results["layers"]:
        case = f"{line['shape']} {line['ratio']} {line['tenants']}x{line['tokens']}"
        for name, text in [*line["failed"].items(), *line.get("notes", {}).items()]:
            cases.setdefault((name, text), []).append(case)
    return [f"{NAMES[name]}: {text} ({_few(found)})" for (name, text), found in cases.items()]


def _few(cases: list[str]) -> str:
    return cases[0] if len(cases) == 1 else f"{cases[0]} and {len(cases) - 1} more"


def plot(results: dict[str, Any], path: Path) -> None:
    """As PNG: for each shape a row of panels, time over tenants for each number of tokens, and bandwidth."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(line["shape"] for line in results["layers"]))
    tokens = sorted({line["tokens"] for line in results["layers"]})
    ratios = list(dict.fromkeys(line["ratio"] for line in results["layers"]))
    figure = Figure(figsize=(4 * (len(tokens) + 1), 3.4 * len(shapes) + 0.9), layout="constrained")
    axes = figure.subplots(len(shapes), len(tokens) + 1, squeeze=False)
    for shape, row in zip(shapes, axes, strict=True):
        lines = [line for line in results["layers"] if line["shape"] == shape]
        for axis, count in zip(row, tokens, strict=False):
            _times(axis, [x for x in lines if x["tokens"] == count and x["ratio"] == ratios[0]])
            axis.set_title(f"{shape}, {count} token{'s' if count > 1 else ''} per tenant", fontsize=10)
        _shares(row[-1], lines, ratios, tokens)
        others = f" (dashed: {', '.join(ratios[1:])})" if ratios[1:] else ""
        row[-1].set_title(f"{shape}, packed bytes{others}", fontsize=10)
    handles = {
        text: h
        for axis in axes[:, :-1].flat
        for h, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False
        )
    machine = results["machine"]
    figure.suptitle(f"Deltas ({ratios[0]}) of one decoder layer, {machine['name']}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())


def _times(axis: Any, lines: list[dict[str, Any]]) -> None:
    for i, (name, label) in enumerate(NAMES.items()):
        points = [(x["tenants"], 1e3 * x["seconds"][name]) for x in lines if name in x["seconds"]]
        if points:
            style = {"linestyle": "--", "color": "0.4"} if name == "base" else {"color": f"C{i}"}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
    axis.set(xscale="log", yscale="log", ylabel="ms")
    _tenants(axis, lines)


def _shares(axis: Any, lines: list[dict[str, Any]], ratios: list[str], tokens: list[int]) -> None:
    """Packed bytes per second as a share of the copy's."""
    for i, count in enumerate(tokens):
        for ratio, dashes in zip(ratios, ("-", "--", ":", "-."), strict=False):
            chosen = [x for x in lines if (x["tokens"], x["ratio"]) == (count, ratio) and "speed_up" in x]
            points = [(x["tenants"], 100 * x["share_of_copy"]) for x in chosen]
            if points:
                label = f"{count} token{'s' if count > 1 else ''}" if ratio == ratios[0] else None
                axis.plot(
                    *zip(*points, strict=True),
                    **{"color": f"C{5 + i}", "linestyle": dashes, "label": label},
                    **{"marker": "o", "markersize": 4},
                )
    axis.set(xscale="log", ylabel="% of a copy's bandwidth")
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend
        axis.legend(frameon=False, fontsize=8, ncols=len(tokens), loc="upper center", columnspacing=1)
    _tenants(axis, lines)


def _tenants(axis: Any, lines: list[dict[str, Any]]) -> None:
    counts = sorted({line["tenants"] for line in lines})
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel("tenants in the batch")
    axis.grid(alpha=0.3)
