"""What the command line names: pairs, tables, methods, numbers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from benchmarks.quality.pairs import Pair, read_pairs
from benchmarks.quality.tables import OURS, PAPER, SAME, TABLES
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.errors import PrinMixError

T = TypeVar("T")


def choose_pairs(
    pairs: str | None,
    only: str | None,
    base: str | None,
    finetuned: str | None,
    calibration: str | None,
    given: dict[str, str | None],
) -> list[Pair]:
    """Those of ``--pairs``, or the one that the other options describe."""
    if pairs is None:
        if base is None or finetuned is None or calibration is None:
            raise PrinMixError(
                "there is no pair to measure",
                expected="--base, --finetuned and --calibration, or --pairs",
                fix="or give --pairs demo after `make demo`",
            )
        return [Pair(Path(finetuned).name, base, finetuned, calibration, **given)]
    if base or finetuned or calibration or any(given.values()):
        raise PrinMixError("--pairs says all about the pairs", fix="leave out the options of a single pair")
    found = read_pairs(pairs)
    if only is None:
        return found
    by_name = {pair.name: pair for pair in found}
    return [_known(by_name, name, "--only") for name in words(only)]


def choose_tables(text: str) -> list[str]:
    """Names of tables, each once."""
    return (
        list(TABLES)
        if text == "all"
        else [_known({n: n for n in (*TABLES, *SAME)}, n, "--table") for n in words(text)]
    )


def choose_methods(text: str | None) -> tuple[str, ...]:
    """All methods, ours last, or those of ``text``."""
    if text is None:
        return (*(name for name in registry.METHODS if name not in (PAPER, OURS)), PAPER, OURS)
    return tuple(_known({name: name for name in registry.METHODS}, name, "--methods") for name in words(text))


def _known(known: dict[str, T], name: str, option: str) -> T:
    if name not in known:
        raise PrinMixError("there is none of this name", where=option, found=name, expected=", ".join(known))
    return known[name]


def words(text: str) -> list[str]:
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def numbers(text: str) -> list[int]:
    try:
        found = [int(item) for item in words(text)]
    except ValueError:
        found = []
    if not found:
        raise PrinMixError("not a list of seeds", where="--seeds", found=text, expected="like 0,1,2")
    return found


def fraction(text: str) -> Fraction:
    try:
        found = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found <= 1:
        raise PrinMixError("not a ratio", found=text, expected="more than 0 and at most 1, such as 1/16")
    return found
