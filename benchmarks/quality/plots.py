"""A picture of each table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.figures import EXACT_MATCH, HELD_OUT, KL, LINEARS, NOTHING, Filled, Line
from benchmarks.quality.tables import TASK
from benchmarks.records import write_file

PANELS = (EXACT_MATCH, KL, HELD_OUT)
NAMES = {
    EXACT_MATCH: "exact match, %",
    KL: "KL(fine-tuned || compressed), nats per token",
    HELD_OUT: "error, %",
}
OVER_RATIO = "9"  # the table whose figures are drawn over the ratio


def plot(tables: Sequence[Filled], path: Path) -> None:
    """As PNG, a row of panels for each pair: ``tables`` are all of one table's."""
    shown = [t for t in tables if t.lines]
    if not shown:
        return
    if shown[0].table.shows != TASK:
        _write(_errors(shown), path)
    else:
        _write(_task(shown), path)


def _task(tables: Sequence[Filled]) -> Figure:
    panels = [p for p in PANELS if any(p in line.figures for t in tables for line in t.lines)]
    over_ratio = tables[0].table.name == OVER_RATIO
    height = 3.2 if over_ratio else max(2.0, 0.8 + 0.24 * max(len(t.lines) for t in tables))
    figure = Figure(figsize=(3 + 3.6 * len(panels), height * len(tables) + 0.5), layout="constrained")
    axes = figure.subplots(len(tables), len(panels), squeeze=False)
    figure.suptitle(f"{tables[0].table.title}")
    for row, filled in zip(axes, tables, strict=True):
        for axis, column in zip(row, panels, strict=True):
            if over_ratio:
                _over_ratio(axis, filled, column)
            else:
                _bars(axis, filled.lines, column, labels=axis is row[0])
            axis.set_title(f"{filled.pair}: {NAMES[column]}", fontsize=8)
            axis.grid(alpha=0.3)
        if over_ratio:
            row[-1].legend(frameon=False, fontsize=8)
    return figure


def _bars(axis: Axes, lines: Sequence[Line], column: str, labels: bool) -> None:
    names = [" ".join(filter(None, line.labels)) for line in lines]
    found = [line.figures.get(column) for line in lines]
    values = [0.0 if f is None or f.mean < NOTHING else f.mean for f in found]
    deviations = [0.0 if f is None else f.std or 0.0 for f in found]
    colours = [f"C{names_of(lines).index(line.labels[0]) % 10}" for line in lines]
    axis.barh(range(len(lines)), values, xerr=deviations, color=colours, error_kw={"lw": 1})
    axis.set_yticks(range(len(lines)), names if labels else [""] * len(lines), fontsize=8)
    axis.invert_yaxis()
    if column != EXACT_MATCH:
        _logarithmic(axis, values, "x")


def _over_ratio(axis: Axes, filled: Filled, column: str) -> None:
    """Over the bytes that each method really took."""
    for number, method in enumerate(names_of(filled.lines)):
        lines = [line for line in filled.lines if line.labels[0] == method and column in line.figures]
        points = sorted((1 / line.figures[LINEARS].mean, line.figures[column]) for line in lines)
        means, deviations = [f.mean for _, f in points], [f.std or 0.0 for _, f in points]
        # On a logarithmic axis a bar down to 0 would have no end.
        down = [
            min(d, 0.9 * m) if column != EXACT_MATCH else d for m, d in zip(means, deviations, strict=True)
        ]
        axis.errorbar(
            [x for x, _ in points],
            means,
            [down, deviations],
            marker="o",
            markersize=4,
            color=f"C{number}",
            label=method,
            capsize=2,
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda share, position: f"1/{1 / share:.0f}")
    axis.set_xlabel("bytes of the linears, as a share", fontsize=8)
    if column != EXACT_MATCH:
        _logarithmic(axis, [1.0], "y")


def _errors(tables: Sequence[Filled]) -> Figure:
    """Errors by third of the layers: a panel for each column, a row of panels for each part."""
    height = max(2.0, 0.8 + 0.16 * max(len(t.lines) for t in tables))
    figure = Figure(figsize=(16, height * len(tables) + 0.5), layout="constrained")
    columns = [c for c in tables[0].columns if c != LINEARS]
    axes = figure.subplots(len(tables), len(columns), squeeze=False)
    figure.suptitle(tables[0].table.title)
    for row, filled in zip(axes, tables, strict=True):
        for axis, column in zip(row, columns, strict=True):
            _bars(axis, filled.lines, column, labels=axis is row[0])
            axis.set_title(column, fontsize=8)
            axis.grid(alpha=0.3)
        row[0].set_title(f"{filled.pair}; {filled.part}\n{columns[0]}", fontsize=8)
    return figure


def names_of(lines: Sequence[Line]) -> list[str]:
    """First labels, each once."""
    return list(dict.fromkeys(line.labels[0] for line in lines))


def _logarithmic(axis: Any, values: Sequence[float], direction: str) -> None:
    """A logarithmic axis where there is anything above 0."""
    if any(value > 0 for value in values):
        getattr(axis, f"set_{direction}scale")("log")


def _write(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_file(path, picture.getvalue())
