"""What a compression method is: one matrix's change in, its quantized form and errors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from vllm_prinmix.compress.allocation.budgets import Curve
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix

Quantized = QuantizedFactors | QuantizedMatrix
# Names to numbers or strings; the same in every run: no times.
Report = dict[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """One method with its options, which are the fields of the subclass; all plain values.

    Methods know one matrix at a time and nothing of models. The same inputs and thread count give the same
    result.
    """

    name: ClassVar[str]  # of --method
    summary: ClassVar[str]  # one line for people
    has_curve: ClassVar[bool] = False  # it can tell what bytes are worth without compressing
    compensates: ClassVar[bool] = False  # by default it is fitted to the compressed layers before
    steps: ClassVar[tuple[str, ...]] = ()  # fields that `--without` switches off

    @property
    def has_own_size(self) -> bool:
        """Whether its size follows from its options: no ratio is needed."""
        return False

    @property
    def repeats(self) -> int:
        """How many of `Hessian.repeated` it needs; see `metrics.hessians`."""
        return 0

    @abstractmethod
    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[Quantized, Report]:
        """float32 dW [rows, cols] -> its quantized form of at most ``budget_bytes``, and its report.

        ``budget_bytes`` is None only for a method that `has_own_size`; it never compresses a matrix whose
        `least_bytes` are more. The report has "error": ||dW X - dW^ X||^2 / ||dW X||^2 on the calibration
        inputs X.
        """

    def curve(self, dw: torch.Tensor, hessian: Hessian, budgets: Sequence[int]) -> Curve:
        """The error to be expected of `compress` at each of ``budgets`` (bytes, ascending).

        It decides how matrices share bytes (`allocation.budgets`); only for a method that `has_curve`.
        """
        raise NotImplementedError

    @abstractmethod
    def least_bytes(self, rows: int, cols: int) -> int:
        """The fewest payload bytes that a matrix of this shape can take (all it takes, with an own size)."""

    def check(self) -> None:
        """Raises PrinMixError for values of options that cannot be used."""
        return

    def for_embedding(self) -> Method:
        """What embeddings and lm_head are compressed with; its result has to be factors (kind `factors`)."""
        return self

    def __str__(self) -> str:
        return self.name

    def options(self) -> dict[str, Any]:
        """All options by name, as JSON holds them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def check_bits(option: str, bits: tuple[int, ...]) -> None:
    """Raises PrinMixError unless ``bits`` are different widths of 0 to 8, one above 0."""
    if not any(bits) or len(set(bits)) != len(bits) or not all(0 <= b <= 8 for b in bits):
        raise PrinMixError(
            "the bit-widths cannot be used",
            where=option,
            found=",".join(map(str, bits)),
            expected="different widths from 0 to 8, one of them above 0, such as 0,2,3,4",
        )


def check_at_least_one(option: str, value: int) -> None:
    """Raises PrinMixError for a number below 1."""
    if value < 1:
        raise PrinMixError("the number is too small", where=option, found=value, expected="at least 1")


def check_not_negative(option: str, value: float) -> None:
    """Raises PrinMixError for a number below 0, infinity and NaN."""
    if not 0 <= value < float("inf"):
        raise PrinMixError("the number is out of range", where=option, found=value, expected="0 or more")


def require_directions(factors: QuantizedFactors, dw: torch.Tensor, options: str) -> None:
    """Raises PrinMixError where nothing of the change was kept; ``options`` are those that decide it."""
    if not factors.directions and dw.any():
        raise PrinMixError(
            "not one direction was chosen, so nothing of the change would be kept",
            found=options,
            expected="0 bits and another width at least: --max-active-bits 2 or more",
        )
