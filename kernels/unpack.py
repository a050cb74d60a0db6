"""Unpacking of packed words inside Triton kernels, at well under one instruction per code.

A block of 128 codes is worked on as 16 *chunks* of 8 codes, for planes of every width. Of a plane of
width w, the words 8q to 8q + 7 (q < w) hold the chunks q, q + w, q + 2w, ...: one in each of their 16 / w
*fields*.

A code becomes a floating-point number without a conversion: its bits are put into the mantissa of a power
of two, (word & mask) | magic, one LOP3 for two codes. With the code's lowest bit at mantissa bit m of M
and the exponent M - m, the number is exactly 2^(M - m) + code, too much by an *offset* that depends on
the field alone. Codes with offset f add f * sum(x) to a product with x; that is subtracted once per many
codes.

The mantissa takes the codes as high up as they fit, because a small offset costs little of the
accumulator's precision: bits M - 6 to M - 1 take six fields of width 1, three of width 2 or (the upper
four) one of width 4, so that offsets are at most 64 and one shift serves as many chunks.

Inline assembly handles two 16-bit lanes per instruction. The plain twin does the same arithmetic lane by
lane; it runs on AMD GPUs and in Triton's interpreter. float32 activations take codes converted as they
are, offset 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 8  # codes

# NumPy, which Triton's interpreter multiplies with, has no bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def offset(chunk: int, width: int) -> int:
    """What is too much in the unpacked codes of a chunk."""
    field, fields, together = chunk // width, 16 // width, 6 // width
    place = field % together
    if field >= fields // together * together:
        place += together - fields % together  # the last ones go to the top
    return 1 << (width * (together - place))


@triton.jit
def _shifted(words, LEFT: tl.constexpr, ASM: tl.constexpr):
    """int16 words << LEFT (>> for a negative one). Bits that cross into a neighbour lane get masked away."""
    RIGHT: tl.constexpr = -LEFT
    if LEFT == 0:
        out = words
    elif ASM and LEFT > 0:
        out = tl.inline_asm_elementwise(
            f"shl.b32 $0, $1, {LEFT};", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    elif ASM:
        out = tl.inline_asm_elementwise(
            f"shr.b32 $0, $1, {RIGHT};", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    elif LEFT > 0:
        out = words << LEFT
    else:
        out = (words.to(tl.uint16, bitcast=True) >> RIGHT).to(tl.int16, bitcast=True)
    return out


@triton.jit
def _magic(words, MASK: tl.constexpr, MAGIC: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """(words & MASK) | MAGIC as DTYPE, which is 16 bits wide."""
    MASKS: tl.constexpr = MASK * 0x10001
    MAGICS: tl.constexpr = MAGIC * 0x10001
    # Assembly with a second operand would not be moved to the registers that the product reads.
    if ASM:
        out = tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASKS}, {MAGICS}, 0xEA;",
            "=r,r",
            [words],
            dtype=tl.bfloat16 if DTYPE == tl.bfloat16 else tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        out = ((words & MASK) | MAGIC).to(tl.int16).to(DTYPE, bitcast=True)
    return out


@triton.jit
def field_codes(words, s: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Field ``s`` of int16 words as offset + code (as the code alone with float32)."""
    if DTYPE == tl.float32:
        return ((words.to(tl.int32) >> (WIDTH * s)) & ((1 << WIDTH) - 1)).to(tl.float32)
    else:
        MANTISSA: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
        BIAS: tl.constexpr = 127 if DTYPE == tl.bfloat16 else 15
        FIELDS: tl.constexpr = 16 // WIDTH
        TOGETHER: tl.constexpr = 6 // WIDTH
        LAST: tl.constexpr = FIELDS // TOGETHER * TOGETHER
        PLACE: tl.constexpr = s % TOGETHER if s < LAST else s - LAST + TOGETHER - FIELDS % TOGETHER
        BIT: tl.constexpr = MANTISSA - WIDTH * (TOGETHER - PLACE)
        MASK: tl.constexpr = ((1 << WIDTH) - 1) << BIT
        MAGIC: tl.constexpr = (BIAS + MANTISSA - BIT) << MANTISSA
        return _magic(_shifted(words, BIT - WIDTH * s, ASM), MASK, MAGIC, DTYPE, ASM)


@triton.jit
def product(codes, values, acc):
    """acc + codes @ values, in float32."""
    if INTERPRETED:
        codes, values = codes.to(tl.float32), values.to(tl.float32)
    return tl.dot(codes, values, acc, input_precision="ieee")


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """float32 values as DTYPE, to the nearest (the interpreter by itself cuts off what bfloat16 lacks)."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def finite(values, DTYPE: tl.constexpr):
    """float32 values as DTYPE, NaN as 0 and overflow as the largest number.

    A tenant whose numbers overflow must hurt itself alone, and NaN in its KV blocks would outlive it.
    """
    LIMIT: tl.constexpr = 65504.0 if DTYPE == tl.float16 else 3.3895313892515355e38  # bfloat16's largest
    values = tl.where(values == values, values, 0.0)
    return rounded(tl.minimum(tl.maximum(values, -LIMIT), LIMIT), DTYPE)
