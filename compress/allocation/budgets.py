"""One byte budget for many matrices: each gets what lowers the sum of their relative errors most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """What a matrix's error is expected to be with more and more bytes; ``bytes`` ascends.

    Errors are relative, ||dW X - dW^ X||^2 / ||dW X||^2.
    """

    bytes: Sequence[int]
    errors: Sequence[float]


def share(
    curves: Mapping[str, Curve], total_bytes: int, weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Bytes of each matrix, ``total_bytes`` in all at most, with the least sum of weighted errors.

    ``weights`` are above 0 (`sensitivity.importance`); None: all errors count alike. Every matrix gets the
    first point of its curve at least. Then bytes go where they buy the most, along the lower convex hull of
    each curve; the last purchase may be a part of a segment. Raises ValueError where the first points are
    more than ``total_bytes``.
    """
    given = {name: curve.bytes[0] for name, curve in curves.items()}
    left = total_bytes - sum(given.values())
    if left < 0:
        raise ValueError("the first points of the curves are more than the budget")
    segments = [
        (slope * (weights[name] if weights else 1), name, size)
        for name, curve in curves.items()
        for slope, size in _hull(curve)
    ]
    # A hull's slopes flatten, so a matrix's segments come in their order.
    for slope, name, size in sorted(segments, key=lambda segment: (-segment[0], segment[1])):
        if slope <= 0 or not left:
            break
        bought = min(size, left)
        given[name] += bought
        left -= bought
    return given


def _hull(curve: Curve) -> list[tuple[float, int]]:
    """(error saved per byte, bytes) of the segments of a curve's lower convex hull."""
    points: list[tuple[int, float]] = []
    for point in zip(curve.bytes, curve.errors, strict=True):
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-1], point):
            points.pop()
        points.append(point)
    return [(_slope(a, b), b[0] - a[0]) for a, b in pairwise(points)]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])
