"""One module's payload: the bytes of a tensor in delta.safetensors <-> quantized factors.

A payload of kind "factors" is, for each bit class, the planes of V's codes and then of U's; after the
last class the direction table (all scales, all zero points of V, all of U), the row scales if any, and
zeros up to a multiple of 16 bytes. Kind "matrix": planes, scales, zero points, zeros.
"""

from __future__ import annotations

import torch

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.schema import BitClass, Factors, Matrix
from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix


def payload_bytes(spec: Factors | Matrix) -> int:
    """Bytes that a payload of this description has."""
    rows, cols = spec.shape
    if isinstance(spec, Matrix):
        return packing.matrix_bytes(spec.bits, rows, cols)
    n = sum(c.directions for c in spec.classes)
    return _plane_bytes(spec) + packing.align(
        packing.DIRECTION_BYTES * n + (2 * rows if spec.row_scale else 0)
    )


def _plane_bytes(spec: Factors) -> int:
    rows, cols = spec.shape
    # By class: a damaged description may name more directions than there is memory for.
    return sum(
        c.directions * (packing.row_bytes(c.v_bits, cols) + packing.row_bytes(c.u_bits, rows))
        for c in spec.classes
    )


def tables(spec: Factors | Matrix, payload: torch.Tensor) -> list[torch.Tensor]:
    """Views of all numbers of a payload that are not codes: scales and zero points."""
    rows, cols = spec.shape
    if isinstance(spec, Matrix):
        start = rows * packing.row_bytes(spec.bits, cols)
        return split_table(payload[start:], [(rows, torch.float32), (rows, torch.float16)])
    n, start = sum(c.directions for c in spec.classes), _plane_bytes(spec)
    fields = [(n, torch.float32), (n, torch.float16), (n, torch.float16)]
    return split_table(payload[start:], fields + ([(rows, torch.float16)] if spec.row_scale else []))


def encode_factors(delta: QuantizedFactors, report: dict | None = None) -> tuple[Factors, torch.Tensor]:
    """Sort directions by bit class (widest V first) and pack them: (description, uint8 payload).

    The order of directions within a class is kept.
    """
    widths = delta.v_bits.long() * 16 + delta.u_bits.long()
    order = torch.argsort(widths, descending=True, stable=True)
    classes, parts = [], []
    start = 0
    for width, count in zip(*torch.unique_consecutive(widths[order], return_counts=True), strict=True):
        v_bits, u_bits, n = int(width) // 16, int(width) % 16, int(count)
        chosen = order[start : start + n]
        parts += [packing.pack(delta.v_codes[chosen], v_bits), packing.pack(delta.u_codes[chosen], u_bits)]
        classes.append(BitClass(v_bits=v_bits, u_bits=u_bits, directions=n))
        start += n
    table = [delta.scale[order].float(), delta.v_zero[order].half(), delta.u_zero[order].half()]
    if delta.row_scale is not None:
        table.append(delta.row_scale.half())
    parts.append(_aligned(table))
    spec = Factors(
        shape=delta.shape, classes=classes, row_scale=delta.row_scale is not None, report=report or {}
    )
    return spec, torch.cat([p.cpu() for p in parts])


def encode_matrix(delta: QuantizedMatrix, report: dict | None = None) -> tuple[Matrix, torch.Tensor]:
    """Pack a module without SVD: (description, uint8 payload)."""
    table = _aligned([delta.scale.float(), delta.zero.half()])
    payload = torch.cat([packing.pack(delta.codes, delta.bits).cpu(), table])
    return Matrix(shape=delta.shape, bits=delta.bits, report=report or {}), payload


def encode(
    delta: QuantizedFactors | QuantizedMatrix, report: dict | None = None
) -> tuple[Factors | Matrix, torch.Tensor]:
    """Pack a module of either kind."""
    if isinstance(delta, QuantizedMatrix):
        return encode_matrix(delta, report)
    return encode_factors(delta, report)


def decode(spec: Factors | Matrix, payload: torch.Tensor) -> QuantizedFactors | QuantizedMatrix:
    """The inverse of encode_*. Raises PrinMixError where the size does not fit the description."""
    expected = payload_bytes(spec)
    if payload.dtype != torch.uint8 or payload.numel() != expected:
        raise PrinMixError(
            "a delta tensor has another size than its description says",
            found=f"{payload.numel()} x {payload.dtype}",
            expected=f"{expected} x torch.uint8",
            fix="compress the fine-tune again",
        )
    rows, cols = spec.shape
    if isinstance(spec, Matrix):
        planes = rows * packing.row_bytes(spec.bits, cols)
        codes = packing.unpack(payload[:planes], spec.bits, rows, cols)
        scale, zero = split_table(payload[planes:], [(rows, torch.float32), (rows, torch.float16)])
        return QuantizedMatrix(codes, spec.bits, scale, zero)
    v_codes: list[torch.Tensor] = []
    u_codes: list[torch.Tensor] = []
    start = 0
    for c in spec.classes:
        for bits, length, codes_of in ((c.v_bits, cols, v_codes), (c.u_bits, rows, u_codes)):
            size = c.directions * packing.row_bytes(bits, length)
            codes_of.append(packing.unpack(payload[start : start + size], bits, c.directions, length))
            start += size
    n = sum(c.directions for c in spec.classes)
    fields = [(n, torch.float32), (n, torch.float16), (n, torch.float16)]
    scale, v_zero, u_zero, *rest = split_table(
        payload[start:], fields + ([(rows, torch.float16)] if spec.row_scale else [])
    )
    counts = torch.tensor([c.directions for c in spec.classes], dtype=torch.long)
    return QuantizedFactors(
        v_codes=torch.cat(v_codes) if v_codes else torch.empty(0, cols, dtype=torch.uint8),
        u_codes=torch.cat(u_codes) if u_codes else torch.empty(0, rows, dtype=torch.uint8),
        v_bits=torch.tensor([c.v_bits for c in spec.classes], dtype=torch.uint8).repeat_interleave(counts),
        u_bits=torch.tensor([c.u_bits for c in spec.classes], dtype=torch.uint8).repeat_interleave(counts),
        scale=scale,
        v_zero=v_zero,
        u_zero=u_zero,
        row_scale=rest[0] if rest else None,
    )


def split_table(table: torch.Tensor, fields: list[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    """Views of consecutive (count, dtype) vectors at the start of uint8 ``table``."""
    views, start = [], 0
    for count, dtype in fields:
        end = start + count * dtype.itemsize
        views.append(table[start:end].view(dtype))
        start = end
    return views


def _aligned(vectors: list[torch.Tensor]) -> torch.Tensor:
    table = torch.cat([v.cpu().contiguous().view(torch.uint8) for v in vectors])
    return torch.nn.functional.pad(table, (0, packing.align(table.numel()) - table.numel()))
