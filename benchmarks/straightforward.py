"""The methods `prinmix` and `prinmix-paper` as their formulas read: a reference for speed and results.

Nothing is shared, sampled or skipped. Singular values come from torch's float32 decomposition. Every width on
every grid is one GPTQ call for all directions, as published (column by column in blocks of 128, with the
Cholesky factor of the inverse), and factorises H anew. Errors are whole matrix products. The grids, the rule
for pairs of widths and the format of the result are the project's own: they are definitions.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from vllm_prinmix.compress.allocation.allocate import allocate
from vllm_prinmix.compress.allocation.pairs import choose_pairs
from vllm_prinmix.compress.methods.paper import Paper, direction_bytes
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.quantization.grid import Grid, clipped_grids, dequantize, minmax_grid, quantize
from vllm_prinmix.compress.stopwatch import Stopwatch
from vllm_prinmix.kernels.packing import ALIGNMENT
from vllm_prinmix.kernels.quantized import QuantizedFactors

BLOCK = 128  # columns of GPTQ between two updates of all later ones
DAMPING = 0.01  # of the mean diagonal of H; of each diagonal entry in U's fit


def solver() -> str:
    """What allocates the paper's widths: CVXPY and SCIP where they are installed."""
    return "scip" if all(map(importlib.util.find_spec, ("cvxpy", "pyscipopt"))) else "exact"


@torch.no_grad()
def second_moments(
    folder: Path, samples: list[torch.Tensor], layers: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """X X^T, float32 [cols, cols], of every linear of the first ``layers`` layers, each by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would name the weights of all other layers
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=layers, dtype=torch.float32)
    model = model.model.to(device).eval()
    found: dict[str, torch.Tensor] = {}
    for name, module in model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):

            def add(module: torch.nn.Module, args: tuple, name: str = f"{name}.weight") -> None:
                x = args[0].flatten(0, -2)
                found[name] = found.get(name, 0) + x.T @ x

            module.register_forward_pre_hook(add)
    for sample in samples:
        model(input_ids=sample[None].to(device), use_cache=False)
    return found


class Straightforward:
    """One matrix: ``dw`` float32 [rows, cols], ``h`` = X X^T float32 [cols, cols], the bytes it may take."""

    def __init__(self, dw: torch.Tensor, h: torch.Tensor, budget_bytes: int, watch: Stopwatch) -> None:
        self.dw, self.h, self.watch = dw, h, watch
        self.budget = budget_bytes // ALIGNMENT * ALIGNMENT
        self.damped = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), device=h.device)
        self.factorised = False

    def lap(self, stage: str) -> None:
        self.watch.lap(stage, self.dw.device)

    def paper(self) -> tuple[QuantizedFactors, float]:
        """Algorithm 1, and the relative error on the calibration inputs."""
        options = Paper()
        u, sigma, v = torch.linalg.svd(self.dw, full_matrices=False)
        self.lap("svd")
        errors = []
        for width in options.bits:
            wrong = v - self.v_codes(v, minmax_grid(v, all_of(width, v)), "simulate")[1] if width else v
            errors.append(sigma.double() ** 2 * ((wrong @ self.h) * wrong).sum(1, dtype=torch.float64))
        self.lap("simulate")
        cost = [direction_bytes(width, *self.dw.shape) for width in options.bits]
        table = torch.stack(errors, 1).cpu().numpy()
        chosen = allocate(table, cost, self.budget, options.max_active_bits, solver()).choice
        self.lap("allocate")
        widths = torch.tensor(options.bits, dtype=torch.uint8)[torch.from_numpy(chosen)].to(v.device)
        order = widths.argsort(descending=True, stable=True)[: int((widths > 0).sum())]
        u, sigma, v, bits = u[:, order], sigma[order], v[order], widths[order]
        grid = minmax_grid(v, bits)
        v_codes, v_hat = self.v_codes(v, grid, "quantize")
        sv = sigma[:, None] * v_hat
        cross, metric = self.dw @ self.h @ sv.T, sv @ self.h @ sv.T
        u = fit_u(u, cross, metric)
        u_grid = minmax_grid(u.T, bits)
        u_codes = gptq(u, metric, u_grid, per_column=True).T.contiguous()
        scale = grid.scale * sigma * u_grid.scale
        factors = QuantizedFactors(v_codes, u_codes, bits, bits.clone(), scale, grid.zero, u_grid.zero)
        self.lap("quantize")
        return factors, self.error(factors)

    def prinmix(self) -> tuple[QuantizedFactors, float]:
        """The default method, and the relative error on the calibration inputs."""
        options = PrinMix()
        rows, cols = self.dw.shape
        lower = torch.linalg.cholesky(self.damped)
        u, sigma, white = torch.linalg.svd(self.dw @ lower, full_matrices=False)
        v = torch.linalg.solve_triangular(lower, white, upper=False, left=False)
        self.lap("svd")
        weight = sigma.double() ** 2
        v_errors, u_errors = [], []
        for bits in options.widths:
            tries = [self.v_codes(v, grid, "simulate")[1] for grid in clipped_grids(v, all_of(bits, v))]
            v_errors.append(weight * torch.stack([self.v_error(v - v_hat) for v_hat in tries]).amin(0))
            u_errors.append(weight * best_rounding(u.T, all_of(bits, v))[1])
        self.lap("simulate")
        pairs, _ = choose_pairs(
            torch.stack(v_errors, 1).cpu().numpy(),
            torch.stack(u_errors, 1).cpu().numpy(),
            weight.cpu().numpy(),
            options.widths,
            rows,
            cols,
            self.budget,
            options.max_active_bits,
        )
        self.lap("allocate")
        chosen = sorted((-p.v, -p.u, i) for i, p in enumerate(pairs) if p is not None)
        v_bits, u_bits = (
            torch.tensor([-c[k] for c in chosen], dtype=torch.uint8, device=v.device) for k in (0, 1)
        )
        index = [i for _, _, i in chosen]
        best, error = self.fit(u[:, index], sigma[index], v[index], v_bits, u_bits, "quantize")
        for _ in range(options.alternations):
            again, new = self.fit(*self.refit_v(best), v_bits, u_bits, "alternate")
            if not new < error:
                break
            best, error = again, new
        return best, error

    def fit(
        self,
        u: torch.Tensor,
        sigma: torch.Tensor,
        v: torch.Tensor,
        v_bits: torch.Tensor,
        u_bits: torch.Tensor,
        stage: str,
    ) -> tuple[QuantizedFactors, float]:
        """V on its best grids, U fitted to it and quantized, then the scales; the time is ``stage``'s."""
        grids = clipped_grids(v, v_bits)
        tries = [self.v_codes(v, grid, stage) for grid in grids]
        best = torch.stack([self.v_error(v - v_hat) for _, v_hat in tries]).argmin(0)
        grid = pick(grids, best)
        v_codes = torch.stack([codes for codes, _ in tries])[best, torch.arange(len(v), device=v.device)]
        sv = sigma[:, None] * dequantize(v_codes, grid)
        cross, metric = self.dw @ self.h @ sv.T, sv @ self.h @ sv.T
        u = fit_u(u, cross, metric)
        u_grid, _ = best_rounding(u.T, u_bits)
        u_codes = gptq(u, metric, u_grid, per_column=True).T.contiguous()
        # With U's codes less their zero points, the error is a quadratic function of the scales.
        flat = u_codes.float() - u_grid.zero.float()[:, None]
        matrix, right = (flat @ flat.T).double() * metric.double(), (flat.T * cross).sum(0).double()
        ridge = 1e-6 * matrix.diagonal().diag()
        old = u_grid.scale.double()
        scale = (old + torch.linalg.solve(matrix + ridge, right - matrix @ old)).float()
        factors = QuantizedFactors(
            v_codes, u_codes, v_bits, u_bits, grid.scale * sigma * scale, grid.zero, u_grid.zero
        )
        self.lap(stage)
        return factors, self.error(factors)

    def refit_v(self, factors: QuantizedFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(U, S, V) with V refitted to the quantized U, its columns scaled to length 1."""
        u, v = factors.u() * factors.scale[:, None], factors.v()
        sizes = u.norm(dim=1)
        u, v = u / sizes[:, None], v * sizes[:, None]
        gram = (u @ u.T).double()
        ridge = DAMPING * torch.eye(len(gram), device=u.device, dtype=torch.float64)
        v = v + torch.linalg.solve(gram + ridge, (u @ self.dw).double() - gram @ v.double()).float()
        return u.T, sizes, v / sizes[:, None]

    def v_codes(self, v: torch.Tensor, grid: Grid, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
        """V's codes on ``grid`` and what they stand for; the time is ``stage``'s, but for factorising H."""
        self.lap(stage)
        factor = inverse_factor(self.h)
        self.lap("factorise again" if self.factorised else "factorise")
        self.factorised = True
        codes = gptq(v, self.h, grid, factor=factor)
        return codes, dequantize(codes, grid)

    def v_error(self, wrong: torch.Tensor) -> torch.Tensor:
        """d H d^T of each row d of ``wrong``, H damped as in GPTQ: float64 [n]."""
        return ((wrong @ self.damped) * wrong).sum(1, dtype=torch.float64)

    def error(self, factors: QuantizedFactors) -> float:
        """||dW X - dW^ X||^2 / ||dW X||^2."""
        wrong = self.dw - factors.dense()
        over, under = (((m @ self.h) * m).sum(dtype=torch.float64) for m in (wrong, self.dw))
        self.lap("report")
        return float(over / under)


def inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of (H + damping)^-1, columns by descending diagonal of H."""
    order = h.diagonal().argsort(descending=True)
    damped = h[order][:, order]
    damped.diagonal().add_(DAMPING * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def gptq(
    weight: torch.Tensor,
    h: torch.Tensor,
    grid: Grid,
    *,
    per_column: bool = False,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes uint8 [n, K] of float32 [n, K]; ``grid`` has an entry per row, or per column."""
    if factor is None:
        factor = inverse_factor(h)
    order = h.diagonal().argsort(descending=True)
    w = weight[:, order].clone()
    codes = torch.empty_like(w, dtype=torch.uint8)
    scale, zero, top = (part[order] if per_column else part for part in (grid.scale, grid.zero, grid.top))
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.zeros(len(w), stop - start, device=w.device)
        for k in range(start, stop):
            own = k if per_column else slice(None)
            code = ((w[:, k] / scale[own]) + zero[own].float()).round().clamp(min=0).minimum(top[own])
            codes[:, k] = code.to(torch.uint8)
            error = (w[:, k] - scale[own] * (code - zero[own].float())) / factor[k, k]
            w[:, k:stop] -= error[:, None] * factor[k, k:stop]
            errors[:, k - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, order.argsort()]


def fit_u(u: torch.Tensor, cross: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Eq. 7: U refitted to the quantized V, drawn to U by the damping."""
    damped = metric + DAMPING * metric.diagonal().diag()
    return u + torch.linalg.solve(damped, (cross - u @ metric).T).T


def best_rounding(vectors: torch.Tensor, bits: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    """The grid of each row that rounding to nearest is best on, and the squared error: float64 [n]."""
    grids = clipped_grids(vectors, bits)
    errors, best = torch.stack(
        [
            (vectors - dequantize(quantize(vectors, grid), grid)).square().sum(1, dtype=torch.float64)
            for grid in grids
        ]
    ).min(0)
    return pick(grids, best), errors


def pick(grids: list[Grid], best: torch.Tensor) -> Grid:
    """Of each row the entry of grid ``best`` [n]."""
    rows = torch.arange(len(best), device=best.device)
    scale, zero = (
        torch.stack([getattr(grid, name) for grid in grids])[best, rows] for name in ("scale", "zero")
    )
    return Grid(scale, zero, grids[0].bits)


def all_of(bits: int, vectors: torch.Tensor) -> torch.Tensor:
    """The same width for every row: uint8 [n]."""
    return torch.full((len(vectors),), bits, dtype=torch.uint8, device=vectors.device)
