"""Byte budgets: what a ratio allows a matrix, and whether its method can keep to it."""

from __future__ import annotations

from fractions import Fraction
from math import floor

from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.errors import PrinMixError


def budget(ratio: Fraction, rows: int, cols: int) -> int:
    """Bytes that a module of this shape may take: ``ratio`` of 2 bytes per parameter."""
    return floor(ratio * 2 * rows * cols)


def check_reachable(name: str, shapes: dict[str, tuple[int, int]], ratio: Fraction, method: Method) -> None:
    """Raise PrinMixError where a module's budget is below the least that ``method`` can do with.

    ``name`` is the option that gave ``ratio``. The message names the worst module and the smallest ratio
    that works for all.
    """
    least = {
        module: Fraction(method.least_bytes(rows, cols), 2 * rows * cols)
        for module, (rows, cols) in shapes.items()
    }
    worst = max(least, key=lambda module: least[module], default=None)
    if worst is None or least[worst] <= ratio:
        return
    rows, cols = shapes[worst]
    raise PrinMixError(
        f"the ratio cannot be reached with the method {method.name}",
        where=f"{name}, {worst}",
        found=f"{as_text(ratio)}: {budget(ratio, rows, cols)} bytes for {rows} x {cols}",
        expected=f"at least {as_text(least[worst], up=True)}, which works for every module",
        fix=f"give {name} {as_text(least[worst], up=True)} or more"
        + (", or leave it out: the method's size is fixed" if method.has_own_size else ""),
    )


def as_text(ratio: Fraction, up: bool = False) -> str:
    """``1/n`` where that is exact, or with ``up`` the next larger 1/n; else a decimal."""
    if ratio.numerator == 1:
        return f"1/{ratio.denominator}"
    if up and ratio < 1:
        return f"1/{floor(1 / ratio)}"
    return f"{float(ratio):.6g}"
