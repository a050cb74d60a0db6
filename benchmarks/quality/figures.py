"""From results to a table's figures: means and deviations over seeds, errors by third and type."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.layers import layer_of
from benchmarks.quality.metrics import THIRDS as LAYER_THIRDS
from benchmarks.quality.metrics import mean_std, third
from benchmarks.quality.runner import Results
from benchmarks.quality.tables import TYPES, Row, Table

LINEARS, ALL = "linears 1/", "all 1/"
EXACT_MATCH, KL, HELD_OUT, CALIBRATION = "exact match %", "KL", "error %", "error % (calibration)"
BYTES = (LINEARS, ALL)
NOTHING = 1e-9  # less is rounding, such as the KL of the fine-tuned model to itself


@dataclass(frozen=True)
class Figure:
    """Over calibration seeds; ``std`` None: there is one value, or it is no mean over seeds."""

    mean: float
    std: float | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Line:
    labels: tuple[str, ...]
    figures: dict[str, Figure]  # by column


@dataclass(frozen=True)
class Filled:
    """A table of one pair, or of the mean over pairs. ``columns`` are those of the figures."""

    table: Table
    pair: str
    part: str  # what of the table this is, where it has more than one; else ""
    columns: tuple[str, ...]
    lines: list[Line]
    skipped: dict[str, str] = field(default_factory=dict)  # labels -> reason

    @property
    def head(self) -> tuple[str, ...]:
        return ("type", *self.table.head) if self.table.shows == TYPES else self.table.head


def fill(table: Table, results: Results, pair: str) -> list[Filled]:
    """The tables' figures for one pair: one `Filled`, or one of absolute and one of relative errors."""
    skipped = {}
    rows = []
    for row in table.rows:
        reason = row.reason if row.setting is None else results.skipped.get(row.setting)
        if reason is not None or row.setting is None:
            skipped[" ".join(filter(None, row.labels))] = reason or "no setting"
        else:
            rows.append((row, results.found[row.setting]))
    if table.shows == "task":
        lines = [Line(row.labels, _figures([_task(r) for r in found])) for row, found in rows]
        every_column = (*BYTES, EXACT_MATCH, KL, HELD_OUT, CALIBRATION)
        present = tuple(c for c in every_column if any(c in line.figures for line in lines))
        return [Filled(table, pair, "", present, lines, skipped)]
    filled = []
    for part, (every, out, scale) in {
        "mean squared error per output element x 1e2": ("all", "out", 100.0),
        "relative, %": ("relative", "relative_out", 100.0),
    }.items():
        names = {every: "all", out: "out"}
        columns = tuple(f"{t} {names[kind]}" for t in LAYER_THIRDS for kind in (every, out))
        lines = []
        for kind in _types(rows) if table.shows == TYPES else [None]:
            for row, found in rows:
                figures = _figures([_by_third(r, results.layers, kind, names, scale) for r in found])
                figures |= _figures([_bytes(r) for r in found]) if kind is None else {}
                lines.append(Line((kind, *row.labels) if kind else row.labels, figures))
        shown = (LINEARS, *columns) if table.shows != TYPES else columns
        filled.append(Filled(table, pair, part, shown, lines, skipped))
    return filled


def average(tables: Sequence[Filled]) -> Filled:
    """The mean over pairs of the rows that all of them have."""
    first = tables[0]
    lines = []
    for line in first.lines:
        same = [next((x for x in t.lines if x.labels == line.labels), None) for t in tables]
        present = [x for x in same if x is not None]
        if len(present) == len(tables):
            figures = {}
            for column in line.figures:
                values = [x.figures[column].mean for x in present if column in x.figures]
                if len(values) == len(tables):
                    figures[column] = Figure(statistics.fmean(values), None, tuple(values))
            lines.append(Line(line.labels, figures))
    return Filled(first.table, "mean over pairs", first.part, first.columns, lines)


def _figures(per_seed: Sequence[dict[str, float]]) -> dict[str, Figure]:
    found = {}
    for column in per_seed[0]:
        values = tuple(figures[column] for figures in per_seed)
        found[column] = Figure(*mean_std(values), values)
    return found


def _task(result: dict[str, Any]) -> dict[str, float]:
    figures = _bytes(result)
    if result["exact_match"] is not None:
        figures[EXACT_MATCH] = 100 * result["exact_match"]
    figures[KL] = result["kl"]
    if result["errors"]:
        errors = list(result["errors"].values())
        figures[HELD_OUT] = 100 * statistics.fmean(e["relative"] for e in errors)
        figures[CALIBRATION] = 100 * statistics.fmean(e["calibration"] for e in errors)
    return figures


def _bytes(result: dict[str, Any]) -> dict[str, float]:
    """Dense bytes over bytes: "linears", and "all" with embeddings, head and what is exact."""
    size = result["bytes"]
    return {
        column: size[f"{name}_dense"] / size[name]
        for column, name in ((LINEARS, "linears"), (ALL, "all"))
        if size[name]
    }


def _by_third(
    result: dict[str, Any], layers: int, kind: str | None, names: dict[str, str], scale: float
) -> dict[str, float]:
    """Means over the modules of each third of the layers; a third without modules is left out."""
    groups: dict[str, list[dict[str, float]]] = {}
    for name, errors in result["errors"].items():
        layer = layer_of(name)
        if layer is not None and kind in (None, _type(name)):
            groups.setdefault(third(layer, layers), []).append(errors)
    return {
        f"{group} {shown}": scale * statistics.fmean(errors[key] for errors in groups[group])
        for group in LAYER_THIRDS
        if group in groups
        for key, shown in names.items()
    }


def _types(rows: Sequence[tuple[Row, list[dict[str, Any]]]]) -> list[str]:
    """The linears' types, such as q_proj, in the model's order."""
    names = [name for _, found in rows for result in found for name in result["errors"]]
    return list(dict.fromkeys(_type(name) for name in names))


def _type(name: str) -> str:
    return name.split(".")[-2]
