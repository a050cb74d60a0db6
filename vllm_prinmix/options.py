"""The plugin's options: from the command line or additional_config, validated, for hooks and scheduler."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_prinmix.errors import PrinMixError

KEY = "prinmix"  # in vLLM's additional_config
DEFAULT_MAX_DELTAS = 4


@dataclass(frozen=True)
class Options:
    """What `vllm serve --enable-prinmix` takes.

    deltas: folder with one delta folder per tenant. max_deltas: distinct tenants in one batch (slots).
    max_cpu_deltas: tenants held in host memory, at least max_deltas.
    """

    deltas: str
    max_deltas: int = DEFAULT_MAX_DELTAS
    max_cpu_deltas: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--max-deltas", self.max_deltas), ("--max-cpu-deltas", self.max_cpu_deltas)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PrinMixError(
                    "not a count of tenants", where=option, found=value, expected="an integer, 1 or more"
                )
        if self.max_cpu_deltas is not None and self.max_cpu_deltas < self.max_deltas:
            raise PrinMixError(
                "fewer tenants in host memory than in a batch",
                where="--max-cpu-deltas",
                found=self.max_cpu_deltas,
                expected=f"at least --max-deltas, {self.max_deltas}",
                fix="raise --max-cpu-deltas or lower --max-deltas",
            )

    @property
    def host_capacity(self) -> int:
        """Tenants held in host memory."""
        return self.max_deltas if self.max_cpu_deltas is None else self.max_cpu_deltas

    @classmethod
    def from_mapping(cls, fields: Any) -> Options:
        """From additional_config["prinmix"]; unknown keys are an error."""
        known = set(cls.__dataclass_fields__)
        if not isinstance(fields, Mapping) or not set(fields) <= known or "deltas" not in fields:
            raise PrinMixError(
                "not a PrinMix configuration",
                where='additional_config["prinmix"]',
                found=dict(fields) if isinstance(fields, Mapping) else fields,
                expected=f"a mapping with deltas and, if wanted, {', '.join(sorted(known - {'deltas'}))}",
            )
        return cls(**{**fields, "deltas": str(fields["deltas"])})

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the PrinMix group to `vllm serve`."""
    group = parser.add_argument_group(
        "PrinMix", "Many full fine-tunes of one base model, served from deltas."
    )
    group.add_argument(
        "--enable-prinmix", action="store_true", default=False, help="Serve the deltas in --deltas."
    )
    group.add_argument(
        "--deltas", metavar="DIR", default=None, help="Folder with one delta folder per tenant."
    )
    group.add_argument(
        "--max-deltas",
        type=int,
        default=None,
        metavar="N",
        help=f"Distinct tenants in one batch (default {DEFAULT_MAX_DELTAS}).",
    )
    group.add_argument(
        "--max-cpu-deltas",
        type=int,
        default=None,
        metavar="N",
        help="Tenants held in host memory (default: --max-deltas).",
    )


def from_namespace(namespace: argparse.Namespace) -> Options | None:
    """The options of a parsed command line; None without --enable-prinmix.

    Raises PrinMixError for --enable-prinmix without --deltas and for PrinMix options without the flag.
    """
    given = {
        "--deltas": getattr(namespace, "deltas", None),
        "--max-deltas": getattr(namespace, "max_deltas", None),
        "--max-cpu-deltas": getattr(namespace, "max_cpu_deltas", None),
    }
    if not getattr(namespace, "enable_prinmix", False):
        if stray := [option for option, value in given.items() if value is not None]:
            raise PrinMixError(
                f"{stray[0]} is given but --enable-prinmix is not",
                fix="add --enable-prinmix, or leave the PrinMix options out",
            )
        return None
    if not given["--deltas"]:
        raise PrinMixError(
            "--enable-prinmix is given but --deltas is not",
            fix="add --deltas DIR, the folder with one delta folder per tenant",
        )
    fields = {"deltas": namespace.deltas, "max_cpu_deltas": namespace.max_cpu_deltas}
    if namespace.max_deltas is not None:
        fields["max_deltas"] = namespace.max_deltas
    options = Options(**fields)
    if not Path(namespace.deltas).is_dir():
        raise PrinMixError(
            "the folder of deltas does not exist",
            where=f"--deltas {namespace.deltas}",
            expected="a folder with one delta folder per tenant",
            fix="make deltas with `prinmix compress --out DIR/NAME`",
        )
    if getattr(namespace, "enable_lora", False):
        raise PrinMixError("--enable-lora cannot be combined with --enable-prinmix yet", fix="drop one")
    return options
