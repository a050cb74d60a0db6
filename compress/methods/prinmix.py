"""The method `prinmix`: widths of V and U chosen together, for the error of the product of both.

It departs from the paper's (paper.py) where measurements say so. U's error is most of what is left when
bits are chosen for V alone (Eq. 8), so both are in the objective and have widths of their own. Directions
are those of the outputs (whiten.py), each vector's grid is the best of several (grid.py), and scales, U and
V are fitted to each other again as long as that lowers the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_prinmix.compress.allocation.allocate import Allocation
from vllm_prinmix.compress.allocation.budgets import Curve
from vllm_prinmix.compress.allocation.pairs import Pair, choose_pairs
from vllm_prinmix.compress.measure import ROWS, activation_energy, activation_error
from vllm_prinmix.compress.methods.base import (
    Method,
    check_at_least_one,
    check_bits,
    check_not_negative,
    require_directions,
)
from vllm_prinmix.compress.quantization.best_grid import quantize_best, simulate
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import Grid, dequantize
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.rtc import corrected, normal_equations
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.compress.quantization.whiten import whitened_svd
from vllm_prinmix.compress.stopwatch import Stopwatch
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import ALIGNMENT, factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors


@dataclass(frozen=True)
class PrinMix(Method):
    """What goes beyond the paper's method can be switched off, step by step, to see what it is worth.

    ``max_active_bits``: pairs of widths (V's and U's) in a matrix; each has its padding in memory.
    """

    name: ClassVar[str] = "prinmix"
    summary: ClassVar[str] = "both errors in the objective, widths of their own for V and U, fitted scales"
    has_curve: ClassVar[bool] = True
    compensates: ClassVar[bool] = True
    steps: ClassVar[tuple[str, ...]] = (
        "joint_objective", "separate_widths", "whitening", "clipping", "rtc", "refit_scales", "alternations"
    )  # fmt: skip

    bits: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 8)
    max_active_bits: int = 6
    rank_penalty: float = 0.0  # see `allocate`: fewer directions with more bits
    joint_objective: bool = True  # U's error counts too
    separate_widths: bool = True  # of V and U
    whitening: bool = True
    clipping: bool = True  # grids other than min-max
    rtc: bool = True  # U fitted to the quantized V (Eq. 7)
    refit_scales: bool = True
    alternations: int = 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Ascending, without 0."""
        return tuple(sorted(b for b in self.bits if b))

    def check(self) -> None:
        check_bits("--bits", self.bits)
        check_at_least_one("--max-active-bits", self.max_active_bits)
        check_not_negative("--rank-penalty", self.rank_penalty)
        if 0 not in self.bits:
            raise PrinMixError(
                "directions that are not worth their bytes need the width 0",
                where="--bits",
                found=",".join(map(str, self.bits)),
                expected="0 among them",
            )

    def least_bytes(self, rows: int, cols: int) -> int:
        return factors_bytes([self.widths[0]], [self.widths[0]], rows, cols)

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedFactors, dict[str, Any]]:
        assert budget_bytes is not None
        factors, report = compress_jointly(dw, hessian, budget_bytes, self)
        require_directions(factors, dw, f"--bits {','.join(map(str, self.bits))}")
        return factors, report

    def curve(self, dw: torch.Tensor, hessian: Hessian, budgets: Sequence[int]) -> Curve:
        dw = dw.float()
        directions = _Directions(dw, hessian, max(budgets), self, Stopwatch())
        total = sum(float(hessian.damped_norm(part).sum()) for part in dw.split(ROWS))
        cut = total - float(directions.weight.sum())  # by the SVD, whatever the widths
        errors = [directions.choose(budget)[1].error + cut for budget in budgets]
        return Curve(budgets, [error / total if total else 0.0 for error in errors])


def compress_jointly(
    dw: torch.Tensor,
    hessian: Hessian,
    budget_bytes: int,
    steps: PrinMix | None = None,
    watch: Stopwatch | None = None,
) -> tuple[QuantizedFactors, dict[str, float]]:
    """dW ~= U^ diag(s) V^ in at most ``budget_bytes`` payload bytes, and the errors on the way.

    ``dw`` float32 [rows, cols]; errors are ||dW X - dW^ X||^2 / ||dW X||^2 on calibration data. Directions
    come sorted by widths, then by singular value. The same inputs and thread count give the same result.
    ``watch`` learns the time of each stage.
    """
    steps, watch = steps or PrinMix(), watch or Stopwatch()
    dw = dw.float()
    directions = _Directions(dw, hessian, budget_bytes, steps, watch)
    pairs, allocation = directions.choose(budget_bytes)
    watch.lap("allocate", dw.device)
    chosen = [(pair, i) for i, pair in enumerate(pairs) if pair is not None]
    if not chosen:
        return QuantizedFactors.empty(dw.shape[0], dw.shape[1], dw.device), {"error": float(bool(dw.any()))}
    chosen.sort(key=lambda entry: (-entry[0].v, -entry[0].u, entry[1]))
    index = torch.tensor([i for _, i in chosen], device=dw.device)
    v_bits = torch.tensor([pair.v for pair, _ in chosen], dtype=torch.uint8, device=dw.device)
    u_bits = torch.tensor([pair.u for pair, _ in chosen], dtype=torch.uint8, device=dw.device)
    u, sigma, v = directions.u[:, index], directions.sigma[index], directions.v[index]
    fit = _Fit(dw, hessian, v_bits, u_bits, steps)
    best, error = fit.quantize(u, sigma, v)
    first = error
    watch.lap("quantize", dw.device)
    for _ in range(steps.alternations):
        again, new = fit.quantize(*fit.refit_v(best))
        if not new < error:
            break
        best, error = again, new
    watch.lap("alternate", dw.device)
    measured = activation_error(dw, best.dense(), hessian, fit.total)
    watch.lap("report", dw.device)
    return best, {
        "error_first": first,
        "error": measured,
        "solver_gap": allocation.gap,
        "solver_bound": allocation.bound / (float(directions.weight.sum()) or 1),
    }


class _Directions:
    """The singular directions of a matrix that ``most_bytes`` can hold, and what their widths cost."""

    def __init__(
        self, dw: torch.Tensor, hessian: Hessian, most_bytes: int, steps: PrinMix, watch: Stopwatch
    ) -> None:
        self.steps, self.shape = steps, dw.shape
        most = _useful(dw.shape[0], dw.shape[1], most_bytes)
        svd = whitened_svd(dw, hessian, most) if steps.whitening else thin_svd(dw, most)
        self.u, self.sigma, self.v = svd
        watch.lap("svd", dw.device)
        # The error of leaving a direction out.
        self.weight = self.sigma.double() ** 2 * hessian.damped_norm(self.v)
        v_shares = simulate(self.v, hessian, steps.widths, clipping=steps.clipping)
        u_rows = self.u.T.contiguous()
        u_shares = simulate(u_rows, _euclid(self.u), steps.widths, clipping=steps.clipping)
        self.v_errors = v_shares * self.weight[:, None]
        self.u_errors = u_shares * self.weight[:, None] * steps.joint_objective
        watch.lap("simulate", dw.device)

    def choose(self, budget_bytes: int) -> tuple[list[Pair | None], Allocation]:
        """The widths of each direction within the budget."""
        if not len(self.weight):
            return [], Allocation(np.zeros(0, dtype=np.int64), 0.0, 0.0, 0.0)
        return choose_pairs(
            self.v_errors.cpu().numpy(),
            self.u_errors.cpu().numpy(),
            self.weight.cpu().numpy(),
            bits=self.steps.widths,
            rows=self.shape[0],
            cols=self.shape[1],
            budget_bytes=budget_bytes // ALIGNMENT * ALIGNMENT,
            max_classes=self.steps.max_active_bits,
            separate=self.steps.separate_widths,
            rank_penalty=self.steps.rank_penalty,
        )


def _useful(rows: int, cols: int, budget_bytes: int) -> int:
    """Directions that a budget can hold at all, at one bit each."""
    return min(rows, cols, budget_bytes * 8 // (rows + cols) + 1)


def _euclid(u: torch.Tensor) -> Hessian:
    """The metric of U's columns, [rows] for ``u`` [rows, n]: all outputs count the same."""
    return Hessian(torch.ones(len(u), device=u.device))


class _Fit:
    """Directions of given widths fitted to one matrix."""

    def __init__(
        self,
        dw: torch.Tensor,
        hessian: Hessian,
        v_bits: torch.Tensor,
        u_bits: torch.Tensor,
        steps: PrinMix,
    ) -> None:
        self.dw, self.hessian, self.steps = dw, hessian, steps
        self.v_bits, self.u_bits = v_bits, u_bits
        self.total = activation_energy(dw, hessian)

    def quantize(
        self, u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor
    ) -> tuple[QuantizedFactors, float]:
        """V on its grids, U refitted to it (Eq. 7) and quantized, then all scales at once; and the error."""
        clipping = self.steps.clipping
        v_codes, v_grid, _ = quantize_best(v, self.hessian, self.v_bits, clipping=clipping)
        sv = sigma[:, None] * dequantize(v_codes, v_grid)
        cross, metric = normal_equations(self.dw, sv, self.hessian)
        target = corrected(u, cross, metric) if self.steps.rtc else u
        # Which grid a column takes is decided by rounding to nearest; GPTQ then spreads the errors.
        _, u_grid, _ = quantize_best(target.T.contiguous(), _euclid(u), self.u_bits, clipping=clipping)
        u_codes = gptq(target, Hessian(metric), u_grid, per_column=True).T.contiguous()
        scale, error = self._best_scales(u_codes, u_grid, cross, metric)
        factors = QuantizedFactors(
            v_codes=v_codes,
            u_codes=u_codes,
            v_bits=self.v_bits,
            u_bits=self.u_bits,
            scale=v_grid.scale * sigma * scale,
            v_zero=v_grid.zero,
            u_zero=u_grid.zero,
        )
        return factors, error

    def _best_scales(
        self, codes: torch.Tensor, grid: Grid, cross: torch.Tensor, metric: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """U's scales that are best together, a least-squares problem in their number, and the error.

        The entries of its matrix are (u_i . u_j)(s_i v_i H v_j^T s_j), of its right side
        u_i^T dW H v_i^T s_i, with u in codes less the zero point.
        """
        u = codes.float() - grid.zero.float()[:, None]
        matrix = (u @ u.T).double() * metric.double()
        right = (u.T * cross).sum(0, dtype=torch.float64)
        scale = grid.scale.double()
        if self.steps.refit_scales:
            norm = matrix.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
            scaled = matrix / norm[:, None] / norm
            scaled.diagonal().add_(1e-6)
            scale = scale + torch.linalg.solve(scaled, (right - matrix @ scale) / norm) / norm
        error = self.total - 2 * float(scale @ right) + float(scale @ matrix @ scale)
        return scale.float(), error / self.total if self.total else 0.0

    def refit_v(self, factors: QuantizedFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(U, S, V) with V refitted to the quantized U, whose columns have length 1."""
        u = factors.u() * factors.scale[:, None]  # [n, rows], scales included
        sizes = u.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        u /= sizes[:, None]
        gram = (u @ u.T).double()
        v = factors.v() * sizes[:, None]
        residual = (u @ self.dw).double() - gram @ v.double()
        gram.diagonal().add_(0.01)
        v += torch.linalg.solve(gram, residual).float()
        return u.T.contiguous(), sizes, v / sizes[:, None]
