"""The paper's method (Algorithm 1): a delta to singular directions of mixed width within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_prinmix.compress.allocation.allocate import SOLVERS, allocate
from vllm_prinmix.compress.measure import activation_energy, activation_error, factors_error
from vllm_prinmix.compress.methods.base import (
    Method,
    check_at_least_one,
    check_bits,
    check_not_negative,
    require_directions,
)
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian, require_finite
from vllm_prinmix.compress.quantization.rtc import correct_target
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.compress.quantization.threads import one_thread_if_small
from vllm_prinmix.compress.stopwatch import Stopwatch
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import ALIGNMENT, DIRECTION_BYTES, factors_bytes, row_bytes
from vllm_prinmix.kernels.quantized import MAX_BITS, QuantizedFactors

CANDIDATE_BITS = (0, 2, 3, 4, 5, 6, 7, 8)
MAX_ACTIVE_BITS = 4
SIMULATED_ENTRIES = 1 << 26  # weights quantized in one stacked call; bounds the memory (1 GB), not the result


@dataclass(frozen=True)
class Paper(Method):
    """`compress_factors` as a method; ``max_active_bits`` is f_max, ``rtc`` the correction of U (Eq. 7).

    ``u_bits`` is one width for all of U (the paper's Table 8); 0: each direction's U is as wide as its V.
    """

    name: ClassVar[str] = "prinmix-paper"
    summary: ClassVar[str] = "Algorithm 1 of the paper"
    steps: ClassVar[tuple[str, ...]] = ("rtc",)

    bits: tuple[int, ...] = CANDIDATE_BITS
    max_active_bits: int = MAX_ACTIVE_BITS
    solver: str = "scip"
    rtc: bool = True
    rank_penalty: float = 0.0  # see `allocate`: fewer directions with more bits
    u_bits: int = 0

    def check(self) -> None:
        check_bits("--bits", self.bits)
        check_at_least_one("--max-active-bits", self.max_active_bits)
        check_not_negative("--rank-penalty", self.rank_penalty)
        if not 0 <= self.u_bits <= MAX_BITS:
            raise PrinMixError("no width of U", found=self.u_bits, expected=f"0 (as V's) to {MAX_BITS}")
        if self.solver not in SOLVERS:
            raise PrinMixError(
                "unknown solver", where="--solver", found=self.solver, expected=" or ".join(SOLVERS)
            )

    def least_bytes(self, rows: int, cols: int) -> int:
        narrowest = min(b for b in self.bits if b)
        return factors_bytes([narrowest], [self.u_bits or narrowest], rows, cols)

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[QuantizedFactors, dict[str, Any]]:
        assert budget_bytes is not None
        factors, report = compress_factors(
            dw,
            hessian,
            budget_bytes=budget_bytes,
            candidate_bits=self.bits,
            max_active_bits=self.max_active_bits,
            solver=self.solver,
            rtc=self.rtc,
            rank_penalty=self.rank_penalty,
            u_bits=self.u_bits,
        )
        require_directions(
            factors, dw, f"--max-active-bits {self.max_active_bits}, --bits {','.join(map(str, self.bits))}"
        )
        names = ("error", "error_v", "error_v_predicted", "error_rtc", "solver_gap")
        return factors, {name: getattr(report, name) for name in names}


@dataclass(frozen=True)
class FactorsReport:
    """What compressing one module gave; errors are ||dW X - dW^ X||^2 / ||dW X||^2 on calibration data."""

    error: float  # of the result
    error_v: float  # with V quantized alone: U diag(S) V^
    error_v_predicted: float  # the same, as Eq. 5 and Eq. 8 have it: the sum of the chosen errors
    error_rtc: float  # with V quantized and U corrected (Eq. 7) but not yet quantized
    directions: dict[int, int]  # how many directions have this width; those of 0 bits are dropped
    payload_bytes: int
    solver: str
    solver_gap: float  # 0: the allocation is proved optimal
    seconds: dict[str, float]  # of each step


def compress_factors(
    dw: torch.Tensor,
    hessian: torch.Tensor | Hessian,
    *,
    budget_bytes: int,
    candidate_bits: Sequence[int] = CANDIDATE_BITS,
    max_active_bits: int = MAX_ACTIVE_BITS,
    solver: str = "scip",
    rtc: bool = True,
    rank_penalty: float = 0.0,
    u_bits: int = 0,
) -> tuple[QuantizedFactors, FactorsReport]:
    """Algorithm 1 on one module: dW ~= U^ diag(S) V^ in at most ``budget_bytes`` payload bytes.

    ``dw`` float32 [rows, cols]; ``hessian`` H = X X^T of the module's inputs, float32 [cols, cols] or its
    diagonal [cols] (a `Hessian` is factorised once for all modules that share it). ``solver`` and
    ``rank_penalty``: see `allocate`. Without ``rtc`` U is quantized as it is (the paper's Table 5).
    ``u_bits`` is one width for all of U, 0: as V's. Works on the device of ``dw``; the same inputs and
    thread count give the same result.

    Directions come sorted by width, widest first, then by singular value. There are none where dW is zero
    or the budget does not reach for one: whether that is an error is the caller's to decide. Inputs that
    calibration never saw count for nothing in the choice of directions; give them a small diagonal in H where
    they shall.

    Raises PrinMixError for NaN or infinite entries, shapes that do not fit, bad candidate bits, and a budget
    that cannot be kept (only without 0 among the candidates).
    """
    if (
        not candidate_bits
        or sorted(set(candidate_bits)) != sorted(candidate_bits)
        or not all(0 <= bits <= MAX_BITS for bits in candidate_bits)
    ):
        raise PrinMixError(
            "bad candidate bits", found=list(candidate_bits), expected=f"different widths of 0 to {MAX_BITS}"
        )
    if dw.dim() != 2:
        raise PrinMixError("a delta to be factored is not a matrix", found=tuple(dw.shape))
    rows, cols = dw.shape
    dw = dw.float()
    require_finite(dw, "the delta")
    if not isinstance(hessian, Hessian):
        hessian = Hessian(hessian)
    if hessian.size != cols:
        raise PrinMixError(
            "weights and calibration inputs differ in width", found=f"{cols} columns", expected=hessian.size
        )
    with one_thread_if_small(max(rows, cols)):
        return _algorithm_1(
            dw, hessian, budget_bytes, candidate_bits, max_active_bits, solver, rtc, rank_penalty, u_bits
        )


def _algorithm_1(
    dw: torch.Tensor,
    hessian: Hessian,
    budget_bytes: int,
    candidate_bits: Sequence[int],
    max_active_bits: int,
    solver: str,
    rtc: bool,
    rank_penalty: float,
    u_bits: int,
) -> tuple[QuantizedFactors, FactorsReport]:
    """`compress_factors` on checked arguments."""
    rows, cols = dw.shape
    watch = Stopwatch()
    u, sigma, v = thin_svd(dw)
    watch.lap("svd")
    errors = simulate(v, sigma, hessian, candidate_bits)
    watch.lap("simulate")
    cost = [direction_bytes(bits, rows, cols, u_bits) for bits in candidate_bits]
    # Codes come in multiples of ALIGNMENT, so a payload padded to it fits where the unpadded one does.
    budget = budget_bytes // ALIGNMENT * ALIGNMENT
    allocation = allocate(errors.numpy(), cost, budget, max_active_bits, solver, rank_penalty=rank_penalty)
    watch.lap("allocate")

    widths = torch.tensor(candidate_bits)[torch.from_numpy(allocation.choice)]
    kept = torch.argsort(widths, descending=True, stable=True)[: int((widths > 0).sum())].to(dw.device)
    total = activation_energy(dw, hessian)
    if len(kept):
        bits = widths.to(dw.device, torch.uint8)[kept]
        u, sigma, v = u[:, kept], sigma[kept], v[kept]
        v_grid = minmax_grid(v, bits)
        v_codes = gptq(v, hessian, v_grid)
        sv = sigma[:, None] * dequantize(v_codes, v_grid)
        watch.lap("quantize V")
        error_v = factors_error(dw, u, sv, hessian, total)
        watch.lap("report")
        corrected, metric = correct_target(dw, u, sv, hessian)
        if rtc:
            u = corrected
        watch.lap("correct U")
        error_rtc = factors_error(dw, u, sv, hessian, total)
        watch.lap("report")
        u_widths = torch.full_like(bits, u_bits) if u_bits else bits.clone()
        u_grid = minmax_grid(u.T, u_widths)
        u_codes = gptq(u, Hessian(metric), u_grid, per_column=True).T.contiguous()
        watch.lap("quantize U")
        factors = QuantizedFactors(
            v_codes=v_codes,
            u_codes=u_codes,
            v_bits=bits,
            u_bits=u_widths,
            scale=v_grid.scale * sigma * u_grid.scale,
            v_zero=v_grid.zero,
            u_zero=u_grid.zero,
        )
        error = activation_error(dw, factors.dense(), hessian, total)
    else:
        factors = QuantizedFactors.empty(rows, cols, dw.device)
        error = error_v = error_rtc = 1.0 if total else 0.0
    watch.lap("report")
    report = FactorsReport(
        error=error,
        error_v=error_v,
        error_v_predicted=allocation.error / total if total else 0.0,
        error_rtc=error_rtc,
        directions={bits: int((widths == bits).sum()) for bits in sorted(candidate_bits)},
        payload_bytes=factors_bytes(factors.v_bits.tolist(), factors.u_bits.tolist(), rows, cols),
        solver=solver,
        solver_gap=allocation.gap,
        seconds=watch.seconds,
    )
    return factors, report


def simulate(
    v: torch.Tensor, sigma: torch.Tensor, hessian: Hessian, candidate_bits: Sequence[int]
) -> torch.Tensor:
    """E[i, b] = sigma_i^2 dv_i H dv_i^T, dv_i the error of v_i quantized to b bits (Eq. 5): float64 [r, B].

    ``v`` float32 [r, cols], ``sigma`` float32 [r]. 0 bits is the error of dropping the direction, dv_i = v_i.
    All widths of a row are quantized in one stacked call. On the CPU, whatever the device of ``v``.
    """
    widths = [bits for bits in candidate_bits if bits]
    errors = torch.empty(len(v), len(candidate_bits), dtype=torch.float64)
    step = max(1, SIMULATED_ENTRIES // (v.shape[1] * max(1, len(widths))))
    for first in range(0, len(v), step):
        part = v[first : first + step]
        stacked = part.repeat(len(widths), 1)
        grid = minmax_grid(
            stacked, torch.tensor(widths, dtype=torch.uint8, device=v.device).repeat_interleave(len(part))
        )
        stacked -= dequantize(gptq(stacked, hessian, grid), grid)
        quantized = hessian.norm(stacked).view(len(widths), len(part))
        norms = dict(zip(widths, quantized, strict=True))
        for column, bits in enumerate(candidate_bits):
            errors[first : first + step, column] = norms[bits] if bits else hessian.norm(part)
    return errors * sigma.double().cpu()[:, None] ** 2


def direction_bytes(bits: int, rows: int, cols: int, u_bits: int = 0) -> int:
    """B of Eq. 8: bytes of one direction, scale and zero points included; ``u_bits`` 0: U as wide as V."""
    return row_bytes(bits, cols) + row_bytes(u_bits or bits, rows) + DIRECTION_BYTES if bits else 0
