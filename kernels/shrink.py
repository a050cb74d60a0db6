"""The first product, t = scale * (q_V x - v_zero * sum(x)), for all tenants and all parts of a site at once.

A program takes one task after the other: (segment, group of up to 64 directions, block of rows). Which
those are is found on the device, so neither the grid nor any argument depends on the tenants in the
batch. Codes are the left operand and rows of the batch the right one: tensor cores take 8 of these at a
time, and the unpacked codes go from registers into the product without being stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_prinmix.kernels.unpack import field_codes, finite, product, rounded


@triton.jit
def find_segment(task, ends, starts, counts, slots):
    """(task's position in its segment, first sorted row, rows, slot); ``ends``: running sum of tasks."""
    segment = tl.sum((ends <= task).to(tl.int32))
    before = tl.max(tl.where(ends <= task, ends, 0))
    return (
        task - before,
        tl.load(starts + segment),
        tl.load(counts + segment),
        tl.load(slots + segment).to(tl.int64),
    )


@triton.jit
def _plane(
    acc,  # float32 [N, M]
    words,  # int16: the plane's first word for this task
    directions,
    blocks,
    x,  # first sorted row
    sums,
    steps,
    rows,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc + q x over one plane of the group's codes."""
    n = tl.arange(0, N)
    r = tl.arange(0, 32)  # a chunk of 8 codes from each of the step's 4 blocks
    m = tl.arange(0, M)
    # Tiles in excess read the last one again.
    tile = tl.minimum(n // 16, (directions - 1) // 16)
    column = tl.max_contiguous(tl.multiple_of(tile * (blocks * (128 * WIDTH)) + n % 16, 16), 16)
    at = words + column[:, None] + ((r // 8) * (128 * WIDTH) + (r % 8) * 16)[None, :]
    x_at = x + m[None, :].to(tl.int64) * (steps * 512) + ((r // 8) * 128 + r % 8)[:, None]
    sums_at = sums + m.to(tl.int64) * (steps * 4) + WIDTH // 2
    here = m < rows
    for step in tl.range(0, steps, num_stages=STAGES):
        # Blocks after the last belong to x's zeros, but they may lie beyond the arena.
        inside = (r // 8 + step * 4 < blocks)[None, :]
        for q in tl.static_range(WIDTH):
            packed = tl.load(at + q * 128, mask=inside, other=0)
            for s in tl.static_range(16 // WIDTH):
                xs = tl.load(x_at + (s * WIDTH + q) * 8, mask=here[None, :], other=0)
                acc = product(field_codes(packed, s, WIDTH, DTYPE, ASM), xs, acc)
        if DTYPE != tl.float32:
            acc -= tl.load(sums_at, mask=here, other=0.0)[None, :]
        sums_at += 4
        at += 512 * WIDTH
        x_at += 512
    return acc


@triton.jit
def _task(
    group,  # int64: the group's line of the table (descriptors.GROUP_FIELDS)
    words,
    floats,
    halves,
    first,  # sorted row
    rows,  # of this block, at most M
    blocks,
    x,
    sums,
    steps,
    t,
    t_stride,
    partials,
    partials_stride,
    group_number,
    y,
    y_stride,
    order,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.load(group) * 16
    directions = tl.load(group + 1).to(tl.int32)
    first = first.to(tl.int64)
    acc = tl.zeros((N, M), tl.float32)
    planes = tl.load(group + 9).to(tl.int32)
    previous = tl.load(group + 8 + planes * 3).to(tl.int32)
    for done in range(planes):
        # From the most significant plane down: what is there is scaled, so that one accumulator does.
        plane = planes - 1 - done
        width = tl.load(group + 10 + plane * 3).to(tl.int32)
        place = tl.load(group + 11 + plane * 3).to(tl.int32)
        acc *= (1 << (previous - place)).to(tl.float32)
        previous = place
        start = words + tl.load(group + 12 + plane * 3) * 8
        x_first, sums_first = x + first * (steps * 512), sums + first * (steps * 4)
        if width == 4:
            acc = _plane(
                acc, start, directions, blocks, x_first, sums_first, steps, rows,
                DTYPE, ASM, 4, N, M, STAGES,
            )  # fmt: skip
        elif width == 2:
            acc = _plane(
                acc, start, directions, blocks, x_first, sums_first, steps, rows,
                DTYPE, ASM, 2, N, M, STAGES,
            )  # fmt: skip
        else:
            acc = _plane(
                acc, start, directions, blocks, x_first, sums_first, steps, rows,
                DTYPE, ASM, 1, N, M, STAGES,
            )  # fmt: skip

    n, m = tl.arange(0, N), tl.arange(0, M)
    step = tl.arange(0, STEPS)
    here, real = m < rows, n < directions
    row = first + m
    total = tl.load(
        sums + row[None, :] * (steps * 4) + step[:, None] * 4 + 3,
        mask=here[None, :] & (step < steps)[:, None],
        other=0.0,
    )
    total = tl.sum(total, axis=0)  # sum(x)
    scale = tl.load(floats + tl.load(group + 2) + n, mask=real, other=0.0)
    v_zero = tl.load(halves + tl.load(group + 3) + n, mask=real, other=0.0).to(tl.float32)
    value = (acc - v_zero[:, None] * total[None, :]) * scale[:, None]
    output = tl.load(group + 8)
    if output >= 0:
        target = tl.load(order + row, mask=here, other=0).to(tl.int64)
        y_at = y + target[None, :] * y_stride + output + n[:, None]
        kept = here[None, :] & real[:, None]
        before = tl.load(y_at, mask=kept, other=0).to(tl.float32)
        tl.store(y_at, finite(before + value, y.dtype.element_ty), mask=kept)
    else:
        # The next product sees rounded numbers, and what it must subtract is a sum over just these.
        t_value = rounded(value, DTYPE)
        tl.store(t + row[None, :] * t_stride + column + n[:, None], t_value, mask=here[None, :])
        u_zero = tl.load(halves + tl.load(group + 4) + n, mask=real, other=0.0).to(tl.float32)
        wide = t_value.to(tl.float32)
        plain = tl.sum(wide, axis=0)
        out = partials + row * partials_stride + group_number * 4
        for i in tl.static_range(3):
            tl.store(out + i, plain * tl.load(group + 5 + i).to(tl.float32), mask=here)
        tl.store(out + 3, tl.sum(wide * u_zero[:, None], axis=0), mask=here)


@triton.jit
def shrink_kernel(
    words,  # int16, the arena; tables int64, floats float32, halves float16: the same memory
    tables,
    floats,
    halves,
    entries,  # int64 [slots]: position of a slot's table, or -1
    slots,  # int32 [SEGMENTS]; starts, counts too
    starts,
    counts,
    order,  # int32 [sorted rows]
    blocks,  # of a direction of V
    x,  # [sorted rows, steps * 512]
    sums,  # float32 [sorted rows, steps, 4]
    steps,
    t,  # out [sorted rows, columns], DTYPE
    t_stride,
    partials,  # out float32 [sorted rows, groups, 4]: sums over a group of t, see expand._excess
    partials_stride,
    y,  # in and out [rows of the batch, output columns]: only parts without SVD write to it
    y_stride,
    least,  # rows of a segment for this launch to take it: `least` to `most`
    most,
    ASM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    M: tl.constexpr,  # rows of the batch per task
    STEPS: tl.constexpr,  # a power of two, at least `steps`
    STAGES: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, SEGMENTS)
    count = tl.load(counts + lane)
    count = tl.where((count >= least) & (count <= most), count, 0)
    entry = tl.load(entries + tl.load(slots + lane), mask=count > 0, other=-1)
    groups = tl.load(tables + entry, mask=entry >= 0, other=0).to(tl.int32)
    tasks = groups * tl.cdiv(count, M)
    ends = tl.cumsum(tasks)
    for task in range(tl.program_id(0), tl.sum(tasks), tl.num_programs(0)):
        local, start, rows, slot = find_segment(task, ends, starts, counts, slots)
        row_blocks = tl.cdiv(rows, M)
        number, row = local // row_blocks, (local % row_blocks) * M
        table = tables + tl.load(entries + slot)
        group = table + tl.load(table + 1) + number * 19
        _task(
            group, words, floats, halves, start + row, tl.minimum(rows - row, M), blocks, x, sums, steps,
            t, t_stride, partials, partials_stride, number, y, y_stride, order,
            DTYPE, ASM, 64, M, STEPS, STAGES,
        )  # fmt: skip
