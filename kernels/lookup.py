"""What is looked up by row: the embedding's delta, and the tenants' norm weights.

An embedding's rows are codes of U: t is read from them, one code per direction, and the second product over
the codes of V is the one that linear layers use. Its table is that of the transposed factors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_prinmix.kernels.unpack import finite, rounded


@triton.jit
def _slot_of(row, starts, counts, slots, SEGMENTS: tl.constexpr):
    """Slot of a sorted row."""
    lane = tl.arange(0, SEGMENTS)
    count = tl.load(counts + lane)
    segment = tl.sum(((tl.load(starts + lane) + count <= row) & (count > 0)).to(tl.int32))
    return tl.load(slots + segment).to(tl.int64)


@triton.jit
def _add_row(groups, words, floats, halves, row, blocks, hidden, y):
    """y [hidden] += the row of a matrix without SVD, whose rows are directions."""
    line = groups + row // 64 * 19
    n = row % 64
    scale = tl.load(floats + tl.load(line + 2) + n)
    zero = tl.load(halves + tl.load(line + 3) + n).to(tl.float32)
    k = tl.arange(0, 512)
    for start in range(tl.program_id(1) * 512, hidden, tl.num_programs(1) * 512):
        at_k = start + k
        codes = tl.zeros((512,), tl.int32)
        for plane in range(tl.load(line + 9).to(tl.int32)):
            width = tl.load(line + 10 + plane * 3).to(tl.int32)
            place = tl.load(line + 11 + plane * 3).to(tl.int32)
            at = words + tl.load(line + 12 + plane * 3) * 8
            at += (n // 16) * (blocks * width * 128) + n % 16
            word_row = at_k // 128 * (8 * width) + k % 128 % (8 * width)
            word = tl.load(at + word_row * 16, mask=at_k < hidden, other=0).to(tl.int32) & 0xFFFF
            codes += ((word >> (k % 128 // (8 * width) * width)) & ((1 << width) - 1)) << place
        before = tl.load(y + at_k, mask=at_k < hidden, other=0).to(tl.float32)
        value = before + (codes.to(tl.float32) - zero) * scale
        tl.store(y + at_k, finite(value, y.dtype.element_ty), mask=at_k < hidden)


@triton.jit
def embedding_kernel(
    words,  # int16, the arena; tables int64, floats float32, halves float16: the same memory
    tables,
    floats,
    halves,
    entries,  # int64 [slots]: position of a slot's table, or -1
    slots,  # int32 [SEGMENTS]; starts, counts too
    starts,
    counts,
    total,  # int32 [1]
    order,  # int32 [sorted rows]
    ids,  # int64 or int32 [rows of the batch]
    vocabulary,  # rows of the embedding that are here; other ids add nothing
    id_offset,  # of the packed codes
    id_blocks,  # of a direction of U
    blocks,  # of a direction of V (of a row, without SVD)
    hidden,
    t,  # out [sorted rows, columns]
    t_stride,
    partials,  # out float32 [sorted rows, groups, 4]
    partials_stride,
    y,  # in and out [rows of the batch, hidden]: an embedding without SVD is added at once
    y_stride,
    SEGMENTS: tl.constexpr,
):
    DTYPE: tl.constexpr = t.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(total):
        slot = _slot_of(row, starts, counts, slots, SEGMENTS)
        entry = tl.load(entries + slot)
        if entry >= 0:
            table = tables + entry
            target = tl.load(order + row).to(tl.int64)
            asked = tl.load(ids + target).to(tl.int64)
            known = (asked >= 0) & (asked < vocabulary)
            wanted = tl.where(known, asked, 0)
            groups = tl.load(table).to(tl.int32)
            group = table + tl.load(table + 1)
            if (groups > 0) & (tl.load(group + 8, mask=groups > 0, other=-1) >= 0):
                if known:
                    _add_row(group, words, floats, halves, wanted, blocks, hidden, y + target * y_stride)
            else:
                scale_at = tl.load(table + 8)
                row_scale = tl.load(halves + scale_at + wanted, mask=scale_at >= 0, other=1.0).to(tl.float32)
                row_scale = tl.where(known, row_scale, 0.0)
                n = tl.arange(0, 64)
                code = wanted + id_offset
                block, within = code // 128, (code % 128).to(tl.int32)
                for number in range(tl.program_id(1), groups, tl.num_programs(1)):
                    line = group + number * 19
                    directions = tl.load(line + 1).to(tl.int32)
                    real = n < directions
                    codes = tl.zeros((64,), tl.int32)
                    for plane in range(tl.load(line + 9).to(tl.int32)):
                        width = tl.load(line + 10 + plane * 3).to(tl.int32)
                        place = tl.load(line + 11 + plane * 3).to(tl.int32)
                        at = words + tl.load(line + 12 + plane * 3) * 8
                        at += (n // 16) * (id_blocks * width * 128) + n % 16
                        at += (block * 8 * width + within % (8 * width)) * 16
                        word = tl.load(at, mask=real, other=0).to(tl.int32) & 0xFFFF
                        bits = (word >> (within // (8 * width) * width)) & ((1 << width) - 1)
                        codes += bits << place
                    scale = tl.load(floats + tl.load(line + 2) + n, mask=real, other=0.0) * row_scale
                    zero = tl.load(halves + tl.load(line + 3) + n, mask=real, other=0.0).to(tl.float32)
                    value = rounded((codes.to(tl.float32) - zero) * scale, DTYPE)
                    tl.store(t + row * t_stride + tl.load(line) * 16 + n, value)
                    wide = value.to(tl.float32)
                    other = tl.load(halves + tl.load(line + 4) + n, mask=real, other=0.0).to(tl.float32)
                    out = partials + row * partials_stride + number * 4
                    for i in tl.static_range(3):
                        tl.store(out + i, tl.sum(wide) * tl.load(line + 5 + i).to(tl.float32))
                    tl.store(out + 3, tl.sum(wide * other))


@triton.jit
def rms_norm_kernel(
    floats,  # float32, the arena
    entries,  # int64 [slots]: position of a slot's weight, or -1
    slots,  # int32 [SEGMENTS]; starts, counts too
    starts,
    counts,
    total,  # int32 [1]
    order,  # int32 [sorted rows]
    x,  # [rows of the batch, heads, size]
    x_stride,
    x_head_stride,
    y,  # out, likewise
    y_stride,
    y_head_stride,
    size,
    eps,
    SEGMENTS: tl.constexpr,
    SIZE: tl.constexpr,  # a power of two, at least `size`
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(total):
        entry = tl.load(entries + _slot_of(row, starts, counts, slots, SEGMENTS))
        if entry >= 0:
            target = tl.load(order + row).to(tl.int64)
            head = tl.program_id(1).to(tl.int64)
            k = tl.arange(0, SIZE)
            mask = k < size
            values = tl.load(x + target * x_stride + head * x_head_stride + k, mask=mask, other=0)
            wide = values.to(tl.float32)
            factor = tl.rsqrt(tl.sum(wide * wide) / size + eps)
            weight = tl.load(floats + entry + k, mask=mask, other=0.0)
            out = finite(wide * factor * weight, y.dtype.element_ty)
            tl.store(y + target * y_stride + head * y_head_stride + k, out, mask=mask)
