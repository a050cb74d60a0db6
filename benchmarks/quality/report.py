"""Filled tables as the terminal, Markdown and JSON show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.quality.figures import ALL, EXACT_MATCH, LINEARS, NOTHING, Figure, Filled


def title(filled: Filled) -> str:
    name = filled.table.name
    number = f"Table {name}" if name.isdigit() else name.capitalize()
    part = f"; {filled.part}" if filled.part else ""
    return f"{number}. {filled.table.title}. {filled.pair}{part}"


def grid(filled: Filled) -> Table:
    """For the terminal, with the rows that were skipped below it."""
    shown = Table(title=title(filled), title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in filled.head:
        shown.add_column(name, no_wrap=True)
    for column in filled.columns:
        shown.add_column(_header(column), justify="right", no_wrap=True)
    for line in filled.lines:
        shown.add_row(*line.labels, *_cells(filled, line.figures))
    shown.caption = "\n".join(_skipped(filled))
    shown.caption_justify = "left"
    return shown


def markdown(filled: Filled) -> str:
    """The same as a section of a Markdown page."""
    head = [*filled.head, *map(_header, filled.columns)]
    lines = [
        f"### {title(filled)}",
        "",
        _line(head),
        _line(["---"] * len(filled.head) + ["---:"] * len(filled.columns)),
    ]
    lines += [_line([*line.labels, *_cells(filled, line.figures)]) for line in filled.lines]
    skipped = _skipped(filled)
    return "\n".join([*lines, "", *(f"- {text}" for text in skipped), *([""] if skipped else [])])


def as_json(filled: Filled) -> dict[str, Any]:
    return {
        "table": filled.table.name,
        "title": filled.table.title,
        "part": filled.part,
        "pair": filled.pair,
        "rows": [
            {
                "labels": dict(zip(filled.head, line.labels, strict=True)),
                "figures": {
                    column: {"mean": figure.mean, "std": figure.std, "values": list(figure.values)}
                    for column, figure in line.figures.items()
                },
            }
            for line in filled.lines
        ],
        "skipped": filled.skipped,
    }


def text_of(column: str, figure: Figure | None) -> str:
    """A figure in a cell: mean(std) as the paper writes it, or a ratio 1/x."""
    if figure is None:
        return "-"
    if column in (LINEARS, ALL):
        return f"1/{figure.mean:.1f}"
    digits = 1 if column == EXACT_MATCH else None
    if figure.std is None:
        return _number(figure.mean, digits)
    return f"{_number(figure.mean, digits)}({_number(figure.std, digits, 2)})"


def _number(value: float, digits: int | None, significant: int = 3) -> str:
    if digits is not None:
        return f"{value:.{digits}f}"
    if abs(value) < NOTHING:
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{significant}g}"


def _header(column: str) -> str:
    return column.removesuffix(" 1/")


def _cells(filled: Filled, figures: dict[str, Figure]) -> list[str]:
    return [text_of(column, figures.get(column)) for column in filled.columns]


def _skipped(filled: Filled) -> list[str]:
    return [f"{labels}: left out, {reason}" for labels, reason in filled.skipped.items()]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
