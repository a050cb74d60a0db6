"""The second product, y += r * (U t) + bias, for all tenants and all parts of a site at once.

A program takes one task after the other: (segment, part, group of output blocks, block of rows). It goes
through all directions of the part, whatever their classes, and adds to y once: no atomics, the same bits
every time. An output block's 128 codes are 8 chunks (see unpack.py), each with an accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_prinmix.kernels.shrink import find_segment
from vllm_prinmix.kernels.unpack import field_codes, finite, product


@triton.jit
def _replaced(values, i: tl.constexpr, value):
    """The tuple ``values`` with another i-th element."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005 (Triton knows no unpacking)


@triton.jit
def _run(
    acc,  # 16 of float32 [R, M]
    factor,  # 2^place
    words,  # int16: the run's first word
    directions,
    block,  # first output block
    blocks,
    t,  # first sorted row and column
    t_stride,
    rows,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,  # a chunk of 8 outputs from each of R / 8 blocks
    M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc += factor * u t over the directions of one plane of a run."""
    n, r, m = tl.arange(0, N), tl.arange(0, R), tl.arange(0, M)
    # Blocks in excess read the last one again; their outputs are not stored.
    row = tl.minimum(block + r // 8, blocks - 1) * (8 * WIDTH) + r % 8
    at = words + row[:, None] * 16
    t_at = t + m[None, :].to(tl.int64) * t_stride + n[:, None]
    here = (m < rows)[None, :]
    tile_words = blocks * (128 * WIDTH)
    for first in tl.range(0, directions, N, num_stages=STAGES):
        # Tiles in excess meet columns of t that are zero.
        tile = tl.minimum(first // 16 + n // 16, (directions - 1) // 16).to(tl.int64)
        column = tl.max_contiguous(tl.multiple_of(tile * tile_words + n % 16, 16), 16)
        ts = (tl.load(t_at + first, mask=here, other=0) * factor).to(DTYPE)  # exact: a power of two
        grown = acc
        for q in tl.static_range(WIDTH):
            packed = tl.load(at + column[None, :] + q * 128)
            for s in tl.static_range(16 // WIDTH):
                codes = field_codes(packed, s, WIDTH, DTYPE, ASM)
                grown = _replaced(grown, s * WIDTH + q, product(codes, ts, grown[s * WIDTH + q]))
        acc = grown
    return acc


@triton.jit
def _excess(partials, stride, first, groups, rows, i, M: tl.constexpr):
    """float32 [M]: the i-th sums over a part's groups of t (weights of widths 1, 2, 4; u_zero)."""
    m, g = tl.arange(0, M), tl.arange(0, 32)
    total = tl.zeros((M,), tl.float32)
    for start in range(0, groups, 32):
        at = partials + m[None, :].to(tl.int64) * stride + (first + start + g)[:, None] * 4 + i
        mask = (m < rows)[None, :] & (start + g < groups)[:, None]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _task(
    part,  # int64: the part's line of the slot's table (descriptors.PART)
    table,
    words,
    floats,
    halves,
    row,  # sorted, first of this block
    rows,  # of this block, at most M
    block,
    blocks,
    outputs,  # of the part
    offset,  # of its packed codes
    t,
    t_stride,
    partials,
    partials_stride,
    y,  # the part's first column
    y_stride,
    order,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    runs = tl.load(part).to(tl.int32)
    line = table + tl.load(part + 1)
    row = row.to(tl.int64)
    t_row = t + row * t_stride
    zero = tl.zeros((R, M), tl.float32)
    quarter = (zero, zero, zero, zero)
    acc = quarter + quarter + quarter + quarter
    for _ in range(runs):
        column = tl.load(line) * 16
        directions = tl.load(line + 1).to(tl.int32)
        width = tl.load(line + 2).to(tl.int32)
        factor = (1 << tl.load(line + 3).to(tl.int32)).to(tl.float32)
        start = words + tl.load(line + 4) * 8
        t_first = t_row + column
        if width == 4:
            acc = _run(
                acc, factor, start, directions, block, blocks, t_first, t_stride, rows,
                DTYPE, ASM, 4, N, R, M, STAGES,
            )  # fmt: skip
        elif width == 2:
            acc = _run(
                acc, factor, start, directions, block, blocks, t_first, t_stride, rows,
                DTYPE, ASM, 2, N, R, M, STAGES,
            )  # fmt: skip
        else:
            acc = _run(
                acc, factor, start, directions, block, blocks, t_first, t_stride, rows,
                DTYPE, ASM, 1, N, R, M, STAGES,
            )  # fmt: skip
        line += 5

    first_group = tl.load(part + 3).to(tl.int32)
    groups = tl.load(part + 2).to(tl.int32)
    sums = partials + row * partials_stride
    ones = _excess(sums, partials_stride, first_group, groups, rows, 0, M)
    pairs = _excess(sums, partials_stride, first_group, groups, rows, 1, M)
    nibbles = _excess(sums, partials_stride, first_group, groups, rows, 2, M)
    zeros = _excess(sums, partials_stride, first_group, groups, rows, 3, M)
    row_scale, bias = tl.load(part + 4), tl.load(part + 5)
    r, m = tl.arange(0, R), tl.arange(0, M)
    here = m < rows
    target = tl.load(order + row + m, mask=here, other=0).to(tl.int64) * y_stride
    for c in tl.static_range(16):
        excess = zeros
        if DTYPE != tl.float32:  # offsets as in unpack.offset
            excess += ones * (64 >> (c % 6 if c < 12 else c - 10))
            excess += pairs * (64 >> 2 * (c // 2 % 3 if c < 12 else c // 2 - 5)) + nibbles * 16
        value = acc[c] - excess[None, :]
        o = (block + r // 8) * 128 + c * 8 + r % 8 - offset
        real = (o >= 0) & (o < outputs)
        if row_scale >= 0:
            factor = tl.load(halves + row_scale + o, mask=real, other=0.0)
            value *= factor.to(tl.float32)[:, None]
        if bias >= 0:
            value += tl.load(floats + bias + o, mask=real, other=0.0)[:, None]
        y_at = y + target[None, :] + o[:, None]
        mask = here[None, :] & real[:, None]
        before = tl.load(y_at, mask=mask, other=0).to(tl.float32)
        tl.store(y_at, finite(before + value, y.dtype.element_ty), mask=mask)


@triton.jit
def expand_kernel(
    words,  # int16, the arena; tables int64, floats float32, halves float16: the same memory
    tables,
    floats,
    halves,
    entries,  # int64 [slots]: position of a slot's table, or -1
    slots,  # int32 [SEGMENTS]; starts, counts too
    starts,
    counts,
    order,  # int32 [sorted rows]
    parts,  # int64 [parts, 4]: first output column, rows, offset of the packed rows, blocks
    t,  # [sorted rows, columns]
    t_stride,
    partials,  # float32 [sorted rows, groups, 4]
    partials_stride,
    y,  # in and out [rows of the batch, output columns]
    y_stride,
    least,  # rows of a segment for this launch to take it: `least` to `most`
    most,
    ASM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    M: tl.constexpr,  # rows of the batch per task
    BLOCKS: tl.constexpr,  # output blocks per task
    N: tl.constexpr,  # directions per step
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = t.dtype.element_ty
    lane = tl.arange(0, SEGMENTS)
    count = tl.load(counts + lane)
    count = tl.where((count >= least) & (count <= most), count, 0)
    entry = tl.load(entries + tl.load(slots + lane), mask=count > 0, other=-1)
    block_groups = 0
    for i in tl.static_range(PARTS):
        block_groups += tl.cdiv(tl.load(parts + i * 4 + 3).to(tl.int32), BLOCKS)
    tasks = tl.where(entry >= 0, block_groups * tl.cdiv(count, M), 0)
    ends = tl.cumsum(tasks)
    for task in range(tl.program_id(0), tl.sum(tasks), tl.num_programs(0)):
        local, start, rows, slot = find_segment(task, ends, starts, counts, slots)
        row_blocks = tl.cdiv(rows, M)
        block, row = local // row_blocks, (local % row_blocks) * M
        table = tables + tl.load(entries + slot)
        number, before = 0, 0
        for i in tl.static_range(PARTS - 1):
            before_next = before + tl.cdiv(tl.load(parts + i * 4 + 3).to(tl.int32), BLOCKS)
            number = tl.where(block >= before_next, i + 1, number)
            before = before_next
        before = 0
        for i in tl.static_range(PARTS - 1):
            before += tl.where(number > i, tl.cdiv(tl.load(parts + i * 4 + 3).to(tl.int32), BLOCKS), 0)
        line = parts + number * 4
        part = table + 2 + number * 7
        if (tl.load(part) > 0) | (tl.load(part + 5) >= 0):
            _task(
                part, table, words, floats, halves, start + row, tl.minimum(rows - row, M),
                (block - before) * BLOCKS, tl.load(line + 3).to(tl.int32), tl.load(line + 1).to(tl.int32),
                tl.load(line + 2).to(tl.int32), t, t_stride, partials, partials_stride,
                y + tl.load(line), y_stride, order,
                DTYPE, ASM, BLOCKS * 8, M, N, STAGES,
            )  # fmt: skip
