"""The methods that `--method` names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.compress.methods.bitdelta import BitDelta
from vllm_prinmix.compress.methods.delta_come import DeltaCome
from vllm_prinmix.compress.methods.deltazip import DeltaZip
from vllm_prinmix.compress.methods.gpt_zip import GptZip
from vllm_prinmix.compress.methods.gptq import Gptq
from vllm_prinmix.compress.methods.low_rank import LowRank
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.errors import PrinMixError

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (PrinMix, Paper, DeltaCome, BitDelta, LowRank, Gptq, DeltaZip, GptZip)
}


def make(name: str, **options: Any) -> Method:
    """The method ``name`` with ``options``; one that is None keeps its default.

    Raises PrinMixError for an unknown method, an option that it does not have, and bad values.
    """
    if name not in METHODS:
        raise unknown(name)
    kind = METHODS[name]
    given = {option: value for option, value in options.items() if value is not None}
    own = [field.name for field in fields(kind)]
    for option in given:
        if option not in own:
            raise PrinMixError(
                "the method has no such option",
                where=f"--method {name}",
                found=as_flag(option),
                expected=", ".join(map(as_flag, own)) or "no options",
                fix="leave it out",
            )
    method = kind(**given)
    method.check()
    return method


def without(name: str, steps: list[str]) -> dict[str, Any]:
    """Options that switch off ``steps`` (``--without``) of method ``name``.

    Raises PrinMixError for an unknown method, and for a step that it does not have.
    """
    if name not in METHODS:
        raise unknown(name)
    kind = METHODS[name]
    known = {step.replace("_", "-"): step for step in kind.steps}
    for step in steps:
        if step not in known:
            raise PrinMixError(
                "the method has no such step",
                where=f"--method {name} --without",
                found=step,
                expected=", ".join(known) or "nothing: no step of it can be left out",
            )
    return {known[step]: type(getattr(kind, known[step]))(0) for step in steps}  # False, or none of a number


def unknown(name: str) -> PrinMixError:
    return PrinMixError("unknown method", where="--method", found=name, expected=", ".join(METHODS))


def as_flag(option: str) -> str:
    """The name of an option on the command line."""
    return "--" + option.replace("_", "-")
