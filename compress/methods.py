"""The compression methods that `--method` names, and what a method is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from math import floor
from typing import Any

import torch

from vllm_prinmix.compress.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors


class Method(StrEnum):
    PRINMIX = "prinmix"
    PAPER = "prinmix-paper"


class Solver(StrEnum):
    SCIP = "scip"
    EXACT = "exact"


@dataclass(frozen=True)
class Recipe:
    """How every module is compressed. max_active_bits: widths in a module, with `PRINMIX` pairs of widths."""

    method: Method = Method.PAPER
    bits: tuple[int, ...] = (0, 2, 3, 4, 5, 6, 7, 8)
    max_active_bits: int = 4
    solver: Solver = Solver.SCIP

    @classmethod
    def of(cls, method: Method) -> Recipe:
        """The method as it is meant to be used."""
        if method is Method.PRINMIX:
            return cls(method, (0, 1, 2, 3, 4, 5, 6, 8), max_active_bits=6, solver=Solver.EXACT)
        return cls(method)

    def check(self) -> None:
        """Raises PrinMixError for options that the method does not have."""
        if self.method is Method.PRINMIX and (self.solver is not Solver.EXACT or 0 not in self.bits):
            raise PrinMixError(
                "an option does not fit the method",
                where=f"--method {self.method}",
                found=f"--solver {self.solver}, --bits {','.join(map(str, self.bits))}",
                expected="--solver exact, and 0 among --bits",
                fix="leave them out: the defaults are made for the method",
            )

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int
    ) -> tuple[QuantizedFactors, dict[str, Any]]:
        """float32 dW [rows, cols] -> its factors of at most ``budget_bytes``, and its report.

        The report is the same in every run: it has no times.
        """
        factors, report = (self._jointly if self.method is Method.PRINMIX else self._as_published)(
            dw, hessian, budget_bytes
        )
        if not factors.directions and dw.any():
            raise PrinMixError(
                "not one direction was chosen, so nothing of the change would be kept",
                found=f"--max-active-bits {self.max_active_bits}, --bits {','.join(map(str, self.bits))}",
                expected="0 bits and another width at least: --max-active-bits 2 or more",
            )
        return factors, report

    def _jointly(self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int) -> Any:
        from vllm_prinmix.compress.joint import Steps, compress_jointly

        steps = Steps(bits=tuple(sorted(b for b in self.bits if b)), max_classes=self.max_active_bits)
        return compress_jointly(dw, hessian, budget_bytes, steps)

    def _as_published(self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int) -> Any:
        from vllm_prinmix.compress.paper import compress_factors

        factors, report = compress_factors(
            dw,
            hessian,
            budget_bytes=budget_bytes,
            candidate_bits=list(self.bits),
            max_active_bits=self.max_active_bits,
            solver=self.solver.value,
        )
        names = ("error", "error_v", "error_v_predicted", "error_rtc", "solver_gap")
        return factors, {name: getattr(report, name) for name in names}


def budget(ratio: Fraction, rows: int, cols: int) -> int:
    """Bytes that a module of this shape may take: ``ratio`` of 2 bytes per parameter."""
    return floor(ratio * 2 * rows * cols)


def check_reachable(
    name: str, shapes: dict[str, tuple[int, int]], ratio: Fraction, bits: tuple[int, ...]
) -> None:
    """Raise PrinMixError where a module's budget cannot hold even one direction of the narrowest width.

    ``name`` is the option that gave ``ratio``. The message names the worst module and the smallest ratio
    that works for all.
    """
    narrowest = min(b for b in bits if b)
    least = {
        module: Fraction(factors_bytes([narrowest], [narrowest], rows, cols), 2 * rows * cols)
        for module, (rows, cols) in shapes.items()
    }
    worst = max(least, key=lambda module: least[module], default=None)
    if worst is None or least[worst] <= ratio:
        return
    rows, cols = shapes[worst]
    raise PrinMixError(
        "the ratio cannot be reached: not even one direction fits",
        where=f"{name}, {worst}",
        found=f"{as_text(ratio)}: {budget(ratio, rows, cols)} bytes for {rows} x {cols}",
        expected=f"at least {as_text(least[worst], up=True)}, which works for every module",
        fix=f"give {name} {as_text(least[worst], up=True)} or more",
    )


def as_text(ratio: Fraction, up: bool = False) -> str:
    """``1/n`` where that is exact, or with ``up`` the next larger 1/n; else a decimal."""
    if ratio.numerator == 1:
        return f"1/{ratio.denominator}"
    if up and ratio < 1:
        return f"1/{floor(1 / ratio)}"
    return f"{float(ratio):.6g}"
