"""Options that several commands have, and texts of options as values."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.schema import Budget

BaseOption = Annotated[
    str, typer.Option("--base", help="The base model: a checkpoint folder or a cached hub id.")
]
LoraOption = Annotated[
    str | None, typer.Option(help="In place of --finetuned: a PEFT LoRA adapter of the base.")
]
DeltaArgument = Annotated[Path, typer.Argument(help="A delta folder.")]


def one_source(finetuned: str | None, from_lora: str | None) -> str:
    """The fine-tune, given in one of two ways."""
    if (finetuned is None) == (from_lora is None):
        raise PrinMixError(
            "the fine-tune is needed, once",
            where="--finetuned, --from-lora",
            found="neither" if finetuned is None else "both",
            expected="--finetuned CHECKPOINT, or --from-lora ADAPTER",
        )
    return finetuned or from_lora or ""


def fraction(option: str, text: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise PrinMixError(
            "the ratio is not a number",
            where=option,
            found=text,
            expected="a fraction such as 1/16 or 0.0625",
        ) from None


def sharing(text: str) -> Budget:
    if text not in get_args(Budget):
        expected = " or ".join(get_args(Budget))
        raise PrinMixError("unknown budget", where="--budget", found=text, expected=expected)
    return cast(Budget, text)


def widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PrinMixError(
            "the bit-widths cannot be read", where="--bits", found=text, expected="numbers such as 0,2,3,4"
        ) from None
