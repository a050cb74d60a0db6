"""A span of GPTQ's columns in one launch: on a GPU, launching them one by one takes longer than the work."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

SPAN = 32  # columns of a launch: as many values of a row are in registers
ROWS = 32  # rows of a program, one to a thread: columns then feed back without leaving it


@triton.jit(do_not_specialize=["start", "stop"])
def leaf_kernel(
    weight,  # float32 [K, n]: a column of the matrix is a row here, as in all of these
    target,  # float32 [K, n]: w_k + the errors fed back so far; changed within the span
    error,  # out float32 [K, n]: of the span
    codes,  # out float32 [K, n]: of the span
    factor,  # float32 [K, K]
    top,  # float32 [K, n], the largest codes
    n,
    size,  # K
    top_column,  # strides of `top`, which may be expanded
    top_row,
    start,  # of the span
    stop,
    SPAN: tl.constexpr,  # at least stop - start
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    columns = tl.arange(0, SPAN)
    here = (start + columns).to(tl.int64)[:, None] * n + rows[None, :]
    there = (columns < stop - start)[:, None] & inside[None, :]
    values = tl.load(target + here, mask=there, other=0.0)
    for step in range(stop - start):
        column = stop - start - 1 - step
        k = (start + column).to(tl.int64)
        at = k * n + rows
        value = tl.sum(tl.where((columns == column)[:, None], values, 0.0), axis=0)
        largest = tl.load(top + k * top_column + rows * top_row, mask=inside, other=0.0)
        # To the nearest integer, ties to even: floats of this size have no fraction left.
        code = (tl.minimum(tl.maximum(value, 0.0), largest) + 12582912.0) - 12582912.0
        missed = tl.load(weight + at, mask=inside, other=0.0) - code
        tl.store(codes + at, code, mask=inside)
        tl.store(error + at, missed, mask=inside)
        feedback = tl.load(factor + k * size + start + columns, mask=columns < column, other=0.0)
        values += feedback[:, None] * missed[None, :]
    tl.store(target + here, values, mask=there)


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
    """`gptq.leaf` on a GPU, for at most SPAN columns."""
    size, n = weight.shape
    assert all(part.is_contiguous() for part in (weight, target, error, codes, factor))
    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        leaf_kernel[(triton.cdiv(n, ROWS),)](
            weight,
            target,
            error,
            codes,
            factor,
            top,
            n,
            size,
            *top.stride(),
            start,
            stop,
            SPAN=SPAN,
            ROWS=ROWS,
            num_warps=1,
        )
