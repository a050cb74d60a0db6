"""GPTQ: quantization of rows one column at a time, each column's error fed back into the later ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vllm_prinmix.compress.quantization.grid import Grid
from vllm_prinmix.compress.quantization.hessian import Hessian, require_finite
from vllm_prinmix.compress.quantization.threads import one_thread_if_small
from vllm_prinmix.errors import PrinMixError

# Columns that feed back into each other one by one; wider spans do so by matrix products.
LEAF = 16
# Rows solved at once on a CPU: torch would split longer vectors over threads, which costs more than it gains.
CPU_ROWS = 2048


def gptq(weight: torch.Tensor, hessian: Hessian, grid: Grid, *, per_column: bool = False) -> torch.Tensor:
    """Codes that nearly minimise sum_i (w_i - q_i) H (w_i - q_i)^T (Eq. 1-2): uint8 [n, K].

    ``weight`` is float32 [n, K]. ``grid`` has n entries, one per row, or K entries, one per column, with
    ``per_column``. Rows are independent of each other and each has its own width: many widths of the same
    row may be stacked into one call, which is what makes simulating all candidates cheap.

    With H + damping = F D F^T, F unit lower triangular, the error of row w is
    sum_k D_k (e_k + sum_{j>k} e_j F_jk)^2, e = w - q. Visiting the columns from the last to the first,
    each term is minimised given the ones before by rounding w_k + sum_{j>k} e_j F_jk. This is GPTQ without
    the inverse of H. Columns are visited by descending H_kk (the order is not stored). Inputs that
    calibration never saw have F_jk = 0 and are rounded to nearest, and so is everything with a diagonal H.

    Raises PrinMixError for NaN or infinite weights, a shape that does not fit H, and an H that cannot be
    factorised.
    """
    return gptq_with_errors(weight, hessian, grid, per_column=per_column)[0]


def gptq_with_errors(
    weight: torch.Tensor, hessian: Hessian, grid: Grid, *, per_column: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gptq`, and the error of each row in the damped metric: float64 [n], at no extra cost."""
    n, size = weight.shape
    if size != hessian.size:
        raise PrinMixError(
            "weights and calibration inputs differ in width", found=f"{size} columns", expected=hessian.size
        )
    require_finite(weight, "the matrix to be quantized")
    scale, zero, top = (
        entry.float()[None if per_column else slice(None), slice(None) if per_column else None]
        for entry in (grid.scale, grid.zero, grid.top)
    )
    # All is done in units of codes: a grid's scale moves into the factor, or is common to a row.
    if hessian.is_diagonal:
        units = (weight / scale).add_(zero)
        codes = units.round().clamp_(min=0)
        torch.minimum(codes, top, out=codes)
        missed = units.sub_(codes).mul_(scale).square_().mul_(hessian.matrix)
        errors = missed.sum(1, dtype=torch.float64)
        return codes.to(torch.uint8), errors
    order, factor, pivots = hessian.feedback
    if per_column:
        scale, zero, top = scale[:, order], zero[:, order], top[:, order]
        factor = factor * scale.T / scale
        pivots = pivots * scale[0] ** 2
    codes = torch.empty(n, size, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(n, dtype=torch.float64, device=weight.device)
    step = CPU_ROWS if weight.device.type == "cpu" else max(1, n)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        own = slice(None) if per_column else rows
        # A column is a row of these: contiguous, in the order of the factor.
        units = (weight[rows][:, order] / scale[own]).add_(zero[own]).T.contiguous()
        limit = top[own].T.expand(size, units.shape[1])
        found, errors[rows] = _sweep(units, factor, pivots, limit)
        codes[rows, order] = found.T
    return codes, errors if per_column else errors.mul_(scale[:, 0].double() ** 2)


def _sweep(
    weight: torch.Tensor, factor: torch.Tensor, pivots: torch.Tensor, top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [K, n] of ``weight`` [K, n] (in codes), visited from the last column to the first.

    ``factor`` is unit lower triangular [K, K], ``pivots`` [K] its D; ``top`` [K, n] the largest codes.
    Returns the errors sum_k D_k (..)^2 of each of the n too, float64.
    """
    target = weight.clone()  # w_k + the errors fed back so far
    codes = torch.empty_like(weight)
    error = torch.empty_like(weight)
    span, work = _leaves(weight.device)
    if work is not leaf:
        factor = factor.contiguous()  # its rows are read one by one; Cholesky's are columns

    _visit(
        0, len(weight), span, partial(work, weight, target, error, codes, factor, top), target, error, factor
    )
    missed = target.sub_(codes).square_()
    return codes.to(torch.uint8), (pivots @ missed).double()


def _leaves(device: torch.device) -> tuple[int, Callable[..., None]]:
    """How many columns feed back into each other one by one on a device, and what does it."""
    if device.type != "cuda":
        return LEAF, leaf
    from vllm_prinmix.compress.quantization import gpu_leaf

    return gpu_leaf.SPAN, gpu_leaf.leaf


def _visit(
    start: int,
    stop: int,
    span: int,
    work: Callable[[int, int], None],
    target: torch.Tensor,
    error: torch.Tensor,
    factor: torch.Tensor,
) -> None:
    """``work`` on all columns, at most ``span`` at once; halves feed back into each other by products."""
    # A function of its own: a closure that calls itself is a cycle, and would keep its tensors alive until
    # Python's garbage collector came by.
    if stop - start <= span:
        work(start, stop)
        return
    middle = (start + stop) // 2
    with one_thread_if_small(stop - start):
        _visit(middle, stop, span, work, target, error, factor)
        target[start:middle].addmm_(factor[middle:stop, start:middle].T, error[middle:stop])
        _visit(start, middle, span, work, target, error, factor)


def leaf(
    weight: torch.Tensor,
    target: torch.Tensor,
    error: torch.Tensor,
    codes: torch.Tensor,
    factor: torch.Tensor,
    top: torch.Tensor,
    start: int,
    stop: int,
) -> None:
    """Fill ``codes`` and ``error`` of the columns ``start`` to ``stop``, last one first.

    ``target`` has the errors of all columns from ``stop`` on already, and gets those of the span. All are
    float32 [K, n], ``factor`` [K, K].
    """
    lowest = torch.zeros_like(weight[0])
    for k in range(stop - 1, start - 1, -1):
        code = codes[k]
        torch.round(target[k], out=code)
        torch.clamp(code, lowest, top[k], out=code)
        torch.sub(weight[k], code, out=error[k])
        if k > start:
            target[start:k].addcmul_(factor[k, start:k, None], error[k, None])
