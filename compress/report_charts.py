"""Small charts as inline SVG. Colours are CSS classes of the page, so they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 34


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one CSS class; ``label`` is what a pointer over them shows."""

    css: str
    label: str
    points: Sequence[tuple[float, float]]


class Axis:
    """Values -> pixels. A logarithmic axis leaves out values that are not above 0."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool, zero: bool = False):
        self.log, self.start, self.end = log, start, end
        usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(usable), max(usable)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9:
            low, high = (low, low + 1.0) if zero else (low - 0.5, high + 0.5)
        elif not zero:
            low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
        self.low, self.high = low, high

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers within the axis: of a logarithmic one powers of ten, or 1, 2, 5 times them."""
        if self.log:
            first, last = math.floor(self.low), math.ceil(self.high)
            stride = math.ceil((last - first + 1) / most)
            powers = [10.0**e for e in range(first, last + 1, stride)]
            found = [p for p in powers if self._within(math.log10(p))]
            if len(found) < 2:
                fine = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
                found = [p for p in fine if self._within(math.log10(p))]
            return found or [10 ** ((self.low + self.high) / 2)]
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
        return [
            i * step
            for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]

    def _within(self, at: float) -> bool:
        return self.low - 1e-9 <= at <= self.high + 1e-9


def number(value: float) -> str:
    """A few digits, short: 0.0123, 1.5M, 3e-07."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        return f"{value:.3g}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def lines(
    series: Sequence[Series],
    title: str,
    x_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = False,
    y_span: Sequence[float] = (),
) -> str:
    """Curves, or with ``dots`` points that a thin line joins; the y axis reaches over ``y_span`` too."""
    x = Axis([p[0] for s in series for p in s.points], LEFT, WIDTH - RIGHT, log_x)
    y = Axis([*y_span, *(p[1] for s in series for p in s.points)], HEIGHT - BOTTOM, TOP, log_y)
    body = [_grid(x, y, x_label, whole=dots)]
    for s in series:
        places = [(x(a), y(b), a, b) for a, b in s.points if x.shows(a) and y.shows(b)]
        if not places:
            continue
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in places)
        tip = f"<title>{escape(s.label)}</title>"
        body.append(f'<polyline class="line {s.css}" points="{path}">{tip}</polyline>')
        if dots:
            body += [
                f'<circle class="dot {s.css}" cx="{px:.1f}" cy="{py:.1f}" r="3">'
                f"<title>{escape(s.label)}, {x_label} {number(a)}: {number(b)}</title></circle>"
                for px, py, a, b in places
            ]
    return _svg(title, body)


def stacks(bars: Sequence[tuple[int, dict[str, float]]], title: str, x_label: str, unit: str) -> str:
    """A stacked bar for each (x, value by part), the parts from the bottom up; a part's class is w + name."""
    x = Axis([b[0] for b in bars], LEFT, WIDTH - RIGHT, log=False)
    most = [sum(parts.values()) for _, parts in bars]
    y = Axis([*most, 0.0], HEIGHT - BOTTOM, TOP, log=False, zero=True)
    width = min(18.0, (WIDTH - LEFT - RIGHT) / max(1, len(bars)))
    first, last = min(b[0] for b in bars), max(b[0] for b in bars)
    room = WIDTH - LEFT - RIGHT - width - 6

    def centre(at: float) -> float:
        return LEFT + 3 + width / 2 + (at - first) / max(1, last - first) * room

    body = [_grid(x, y, x_label, whole=True, place=centre)]
    for at, parts in bars:
        bottom = 0.0
        for part, value in parts.items():
            top, low = y(bottom + value), y(bottom)
            body.append(
                f'<rect class="bar w{escape(part)}" x="{centre(at) - width / 2:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, width - 1):.1f}" height="{low - top:.1f}">'
                f"<title>{x_label} {at}, {escape(part)} bits: {number(value)} {unit}</title></rect>"
            )
            bottom += value
    return _svg(title, body)


def _grid(x: Axis, y: Axis, x_label: str, whole: bool, place: Callable[[float], float] | None = None) -> str:
    """Horizontal lines with their values, and values along the x axis; ``whole``: integers only."""
    place = place or x
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x.ticks():
        if whole and abs(value - round(value)) > 1e-6:
            continue
        parts.append(
            f'<text x="{place(value):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
            f"{number(value)}</text>"
        )
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _svg(title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )
