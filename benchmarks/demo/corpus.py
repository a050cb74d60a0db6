"""Real text that is on every machine: the sources of Python's standard library. The base learns from it."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.demo.tokenizer import END

# Installed packages are not the standard library, and not every Python comes with its own tests.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
HELD_OUT = 0.05  # share at the end of the text that training never sees


def standard_library() -> str:
    """All sources of the running Python's standard library, in order of path, joined by END."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    return END.join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def split(text: str) -> tuple[str, str]:
    """``text`` as (training part, held-out part)."""
    border = round(len(text) * (1 - HELD_OUT))
    return text[:border], text[border:]


def windows(text: str, length: int, count: int, rng: random.Random) -> Iterator[list[str]]:
    """Endless batches of ``count`` random windows of ``length`` characters."""
    while True:
        starts = [rng.randrange(len(text) - length) for _ in range(count)]
        yield [text[start : start + length] for start in starts]
