"""GPTQ: quantization of rows one column at a time, each column's error fed back into the later ones."""

from __future__ import annotations

import torch

from vllm_prinmix.compress.quantization.grid import Grid, round_to_grid
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
    n, size = weight.shape
    if size != hessian.size:
        raise PrinMixError(
            "weights and calibration inputs differ in width", found=f"{size} columns", expected=hessian.size
        )
    require_finite(weight, "the matrix to be quantized")
    scale, zero, top = (
        entry.float()[None if per_column else slice(None), slice(None) if per_column else None].expand(
            n, size
        )
        for entry in (grid.scale, grid.zero, grid.top)
    )
    if hessian.is_diagonal:
        return round_to_grid(weight, scale, zero, top).to(torch.uint8)
    order, factor = hessian.feedback
    codes = torch.empty(n, size, dtype=torch.uint8, device=weight.device)
    step = CPU_ROWS if weight.device.type == "cpu" else max(1, n)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        # A column is a row of these: contiguous, in the order of the factor.
        columns = weight[rows].T[order]
        grids = [entry[rows].T[order] if per_column else entry[rows].T for entry in (scale, zero, top)]
        codes[rows, order] = _sweep(columns, factor, grids).T
    return codes


def _sweep(weight: torch.Tensor, factor: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
    """Codes uint8 [K, n] of ``weight`` [K, n], visited from the last column to the first.

    ``factor`` is unit lower triangular [K, K]; ``grids`` are the scale, zero point and top code, [K, n] each.
    """
    target = weight.clone()  # w_k + the errors fed back so far
    error = torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    _visit(0, weight.shape[0], weight, target, error, codes, factor, grids)
    return codes


def _visit(
    start: int,
    stop: int,
    weight: torch.Tensor,
    target: torch.Tensor,
    error: torch.Tensor,
    codes: torch.Tensor,
    factor: torch.Tensor,
    grids: list[torch.Tensor],
) -> None:
    """Fill ``codes`` and ``error`` of the columns ``start`` to ``stop``, last one first."""
    # A function of its own: a closure that calls itself is a cycle, and would keep its tensors alive until
    # Python's garbage collector came by.
    if stop - start > LEAF:
        middle = (start + stop) // 2
        with one_thread_if_small(stop - start):
            _visit(middle, stop, weight, target, error, codes, factor, grids)
            target[start:middle].addmm_(factor[middle:stop, start:middle].T, error[middle:stop])
            _visit(start, middle, weight, target, error, codes, factor, grids)
        return
    scale, zero, top = grids
    for k in range(stop - 1, start - 1, -1):
        code = round_to_grid(target[k], scale[k], zero[k], top[k])
        codes[k] = code
        torch.sub(weight[k], code.sub_(zero[k]).mul_(scale[k]), out=error[k])
        target[start:k].addcmul_(factor[k, start:k, None], error[k, None])
