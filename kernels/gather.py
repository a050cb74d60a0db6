"""The rows of tenants, sorted by segment and cut into whole steps: what the product with V reads.

The main loop of that product then needs no indices, and the sums that take the offsets of unpacked codes
and the zero points out again are formed once, not by every task.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCKS = 4  # per step: each chunk of 8 codes then gives a dot product over 32
STEP = 128 * BLOCKS  # codes


@triton.jit
def gather_kernel(
    x,  # [rows of the batch, cols]
    x_stride,
    cols,
    col_offset,  # of the packed codes: x[:, k] belongs to code k + col_offset
    total,  # int32 [1]: rows in segments
    order,  # int32 [sorted rows]: row of the batch
    offsets,  # float32 [4, 512]: of the codes of a step in planes of width 1, 2 and 4; and ones
    steps,  # of 512 codes
    sorted_x,  # out [sorted rows, steps * 512]
    sums,  # out float32 [sorted rows, steps, 4]: sum(offset * x) for each line of `offsets`
    STEPS: tl.constexpr,  # of a program
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(total):
        source = x + tl.load(order + row).to(tl.int64) * x_stride
        k, line = tl.arange(0, 512), tl.arange(0, 4)
        weight = tl.load(offsets + line[:, None] * 512 + k[None, :])
        for step in range(tl.program_id(1) * STEPS, min(tl.program_id(1) * STEPS + STEPS, steps)):
            at = step * 512 + k - col_offset
            values = tl.load(source + at, mask=(at >= 0) & (at < cols), other=0)
            tl.store(sorted_x + (row * steps + step) * 512 + k, values)
            tl.store(
                sums + (row * steps + step) * 4 + line,
                tl.sum(weight * values.to(tl.float32)[None, :], axis=1),
            )
