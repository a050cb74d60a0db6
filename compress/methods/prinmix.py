"""The method `prinmix`: widths of V and U chosen together, for the error of the product of both.

It departs from the paper's (paper.py) where measurements say so. U's error is most of what is left when
bits are chosen for V alone (Eq. 8), so both are in the objective and have widths of their own. Directions
are those of the outputs (whiten.py), each vector's grid is the best of several (grid.py), and scales, U and
V are fitted to each other again as long as that lowers the error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vllm_prinmix.compress.allocation.pairs import choose_pairs
from vllm_prinmix.compress.measure import activation_error
from vllm_prinmix.compress.methods.base import (
    Method,
    check_at_least_one,
    check_bits,
    check_not_negative,
    require_directions,
)
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import Grid, clipped_grids, dequantize, minmax_grid, quantize
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.rtc import correct_target
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.compress.quantization.whiten import whitened_svd
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
    steps: ClassVar[tuple[str, ...]] = (
        "joint_objective", "separate_widths", "whitening", "clipping", "refit_scales", "alternations"
    )  # fmt: skip

    bits: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 8)
    max_active_bits: int = 6
    rank_penalty: float = 0.0  # see `allocate`: fewer directions with more bits
    joint_objective: bool = True  # U's error counts too
    separate_widths: bool = True  # of V and U
    whitening: bool = True
    clipping: bool = True  # grids other than min-max
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


def compress_jointly(
    dw: torch.Tensor, hessian: Hessian, budget_bytes: int, steps: PrinMix | None = None
) -> tuple[QuantizedFactors, dict[str, float]]:
    """dW ~= U^ diag(s) V^ in at most ``budget_bytes`` payload bytes, and the errors on the way.

    ``dw`` float32 [rows, cols]; errors are ||dW X - dW^ X||^2 / ||dW X||^2 on calibration data. Directions
    come sorted by widths, then by singular value. The same inputs and thread count give the same result.
    """
    steps = steps or PrinMix()
    dw = dw.float()
    rows, cols = dw.shape
    if steps.whitening:
        u, sigma, v = whitened_svd(dw, hessian)
    else:
        u, sigma, v = thin_svd(dw)
    keep = _useful(len(sigma), rows, cols, budget_bytes)
    if not keep:
        return QuantizedFactors.empty(rows, cols, dw.device), {"error": 0.0}
    u, sigma, v = u[:, :keep], sigma[:keep], v[:keep]
    weight = sigma.double() ** 2 * hessian.norm(v)  # v_i H v_i^T S_i^2: what U's column i is worth
    v_errors = torch.stack([_best(v, hessian, b, steps)[0] for b in steps.widths], dim=1)
    v_errors *= sigma.double()[:, None] ** 2
    euclid = Hessian(torch.ones(rows, device=dw.device))
    u_rows = u.T.contiguous()
    u_errors = torch.stack([_best(u_rows, euclid, b, steps)[0] for b in steps.widths], dim=1)
    u_errors *= weight[:, None]
    if not steps.joint_objective:
        u_errors.zero_()
    budget = budget_bytes // ALIGNMENT * ALIGNMENT
    pairs, allocation = choose_pairs(
        v_errors.cpu().numpy(),
        u_errors.cpu().numpy(),
        weight.cpu().numpy(),
        steps.widths,
        rows,
        cols,
        budget,
        steps.max_active_bits,
        separate=steps.separate_widths,
        rank_penalty=steps.rank_penalty,
    )
    certificate = {
        "solver_gap": allocation.gap,
        "solver_bound": allocation.bound / (float(weight.sum()) or 1),
    }
    chosen = [(pair, i) for i, pair in enumerate(pairs) if pair is not None]
    if not chosen:
        return QuantizedFactors.empty(rows, cols, dw.device), {"error": 1.0 if dw.any() else 0.0}
    chosen.sort(key=lambda entry: (-entry[0].v, -entry[0].u, entry[1]))
    index = torch.tensor([i for _, i in chosen], device=dw.device)
    v_bits = torch.tensor([pair.v for pair, _ in chosen], dtype=torch.uint8, device=dw.device)
    u_bits = torch.tensor([pair.u for pair, _ in chosen], dtype=torch.uint8, device=dw.device)
    u, sigma, v = u[:, index], sigma[index], v[index]
    best = _quantize(dw, hessian, u, sigma, v, v_bits, u_bits, steps)
    error = activation_error(dw, best.dense(), hessian)
    errors = {"error_first": error}
    for _ in range(steps.alternations):
        again = _alternate(dw, hessian, best, v_bits, u_bits, steps)
        new = activation_error(dw, again.dense(), hessian)
        if not new < error:
            break
        best, error = again, new
    return best, {**errors, "error": error, **certificate}


def _useful(directions: int, rows: int, cols: int, budget_bytes: int) -> int:
    """Directions that a budget can hold at all, at one bit each."""
    return min(directions, budget_bytes * 8 // (rows + cols) + 1)


def _best(
    vectors: torch.Tensor, hessian: Hessian, bits: int, steps: PrinMix
) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """Each row of ``vectors`` (float32 [n, K]) quantized on the best of its grids, scale refitted.

    Returns the errors d H d^T float64 [n], codes uint8 [n, K] and grids.
    """
    grids = clipped_grids(vectors, bits) if steps.clipping else [_minmax(vectors, bits)]
    errors = codes = None
    scale = zero = grids[0].scale
    for grid in grids:
        found = quantize(vectors, grid) if hessian.is_diagonal else gptq(vectors, hessian, grid)
        refitted = _refit(vectors, found, grid, hessian) if steps.refit_scales else grid
        error = hessian.norm(vectors - dequantize(found, refitted))
        if errors is None or codes is None:
            errors, codes, scale, zero = error, found, refitted.scale, refitted.zero
            continue
        better = error < errors
        errors = torch.where(better, error, errors)
        codes = torch.where(better[:, None], found, codes)
        scale = torch.where(better, refitted.scale, scale)
        zero = torch.where(better, refitted.zero, zero)
    assert errors is not None
    assert codes is not None
    return errors, codes, Grid(scale, zero, grids[0].bits)


def _minmax(vectors: torch.Tensor, bits: int) -> Grid:
    width = torch.full((len(vectors),), bits, dtype=torch.uint8, device=vectors.device)
    return minmax_grid(vectors, width)


def _refit(vectors: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: Hessian) -> Grid:
    """The scale of each vector that is best for its codes, in closed form: <w, q>_H / <q, q>_H."""
    q = codes.float() - grid.zero.float()[:, None]
    weighted = hessian.times(q)
    over, under = (weighted * vectors).sum(1), (weighted * q).sum(1)
    scale = torch.where((under > 0) & (over > 0), over / under, grid.scale)
    return Grid(scale, grid.zero, grid.bits)


def _each_width(
    vectors: torch.Tensor, hessian: Hessian, bits: torch.Tensor, steps: PrinMix
) -> tuple[torch.Tensor, Grid]:
    """`_best` with a width per row."""
    codes = torch.empty_like(vectors, dtype=torch.uint8)
    scale = torch.empty(len(vectors), device=vectors.device)
    zero = torch.empty(len(vectors), dtype=torch.float16, device=vectors.device)
    for width in bits.unique().tolist():
        mine = bits == width
        _, codes[mine], grid = _best(vectors[mine], hessian, width, steps)
        scale[mine], zero[mine] = grid.scale, grid.zero
    return codes, Grid(scale, zero, bits)


def _quantize(
    dw: torch.Tensor,
    hessian: Hessian,
    u: torch.Tensor,
    sigma: torch.Tensor,
    v: torch.Tensor,
    v_bits: torch.Tensor,
    u_bits: torch.Tensor,
    steps: PrinMix,
) -> QuantizedFactors:
    """V on its grids, U refitted to it (Eq. 7) and quantized, then all scales at once."""
    v_codes, v_grid = _each_width(v, hessian, v_bits, steps)
    sv = sigma[:, None] * dequantize(v_codes, v_grid)
    target, metric = correct_target(dw, u, sv, hessian)
    # Which grid a column takes is decided by rounding to nearest; GPTQ then spreads the errors over columns.
    euclid = Hessian(torch.ones(len(u), device=u.device))
    _, u_grid = _each_width(target.T.contiguous(), euclid, u_bits, steps)
    u_codes = gptq(target, Hessian(metric), u_grid, per_column=True).T.contiguous()
    factors = QuantizedFactors(
        v_codes=v_codes,
        u_codes=u_codes,
        v_bits=v_bits,
        u_bits=u_bits,
        scale=v_grid.scale * sigma * u_grid.scale,
        v_zero=v_grid.zero,
        u_zero=u_grid.zero,
    )
    return _with_best_scales(dw, hessian, factors) if steps.refit_scales else factors


def _with_best_scales(dw: torch.Tensor, hessian: Hessian, factors: QuantizedFactors) -> QuantizedFactors:
    """The scales of all directions that are best together: a least-squares problem in their number.

    The entries of its matrix are (u_i . u_j)(v_i H v_j^T), of its right side u_i^T dW H v_i^T.
    """
    u, v = factors.u(), factors.v()
    projected = hessian.times(v)
    matrix = (u @ u.T).double() * (v @ projected.T).double()
    right = ((u @ dw) * projected).sum(1, dtype=torch.float64)
    old = factors.scale.double()
    norm = matrix.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    scaled = matrix / norm[:, None] / norm
    scaled.diagonal().add_(1e-6)
    change = torch.linalg.solve(scaled, (right - matrix @ old) / norm) / norm
    return replace(factors, scale=(old + change).float())


def _alternate(
    dw: torch.Tensor,
    hessian: Hessian,
    factors: QuantizedFactors,
    v_bits: torch.Tensor,
    u_bits: torch.Tensor,
    steps: PrinMix,
) -> QuantizedFactors:
    """V refitted to the quantized U and quantized anew, then U again."""
    u = factors.u().T * factors.scale  # [rows, n], scales included
    sizes = u.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    gram = (u.T @ u).double()
    norm = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    scaled = gram / norm[:, None] / norm
    scaled.diagonal().add_(0.01)
    residual = (u.T @ (dw - u @ factors.v())).double()
    v = factors.v().double() + torch.linalg.solve(scaled, residual / norm[:, None]) / norm[:, None]
    return _quantize(dw, hessian, u / sizes, sizes, v.float(), v_bits, u_bits, steps)
