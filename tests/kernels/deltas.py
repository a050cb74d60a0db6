"""Random quantized deltas for tests of packing and kernels."""

import torch

from vllm_prinmix.format.payload import encode_factors, encode_matrix
from vllm_prinmix.kernels.packed import PackedFactors, PackedMatrix
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix


def random_factors(
    rows: int, cols: int, directions: int, widths: tuple[int, ...], seed: int, row_scale: bool = False
) -> QuantizedFactors:
    """Widths of V and U drawn independently from ``widths``; scales keep dW of order one."""
    generator = torch.Generator().manual_seed(seed)

    def bits() -> torch.Tensor:
        chosen = torch.randint(len(widths), (directions,), generator=generator)
        return torch.tensor(widths, dtype=torch.uint8)[chosen]

    def codes(bits: torch.Tensor, length: int) -> torch.Tensor:
        uniform = torch.rand(directions, length, generator=generator)
        return (uniform * (2.0 ** bits.float())[:, None]).to(torch.uint8)

    v_bits, u_bits = bits(), bits()
    scale = torch.randn(directions, generator=generator) / 2.0 ** (v_bits.float() + u_bits.float())
    return QuantizedFactors(
        v_codes=codes(v_bits, cols),
        u_codes=codes(u_bits, rows),
        v_bits=v_bits,
        u_bits=u_bits,
        scale=scale,
        v_zero=(torch.rand(directions, generator=generator) * 2.0 ** v_bits.float()).half(),
        u_zero=(torch.rand(directions, generator=generator) * 2.0 ** u_bits.float()).half(),
        row_scale=(0.5 + torch.rand(rows, generator=generator)).half() if row_scale else None,
    )


def random_matrix(rows: int, cols: int, bits: int, seed: int) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(seed)
    return QuantizedMatrix(
        codes=torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8),
        bits=bits,
        scale=torch.rand(rows, generator=generator) / 2**bits,
        zero=(torch.rand(rows, generator=generator) * 2**bits).half(),
    )


def pack(delta: QuantizedFactors | QuantizedMatrix) -> PackedFactors | PackedMatrix:
    """Through the payload, as serving does it."""
    if isinstance(delta, QuantizedMatrix):
        spec, payload = encode_matrix(delta)
        return PackedMatrix.from_payload(payload, spec.shape, spec.bits)
    factors, payload = encode_factors(delta)
    classes = [(c.v_bits, c.u_bits, c.directions) for c in factors.classes]
    return PackedFactors.from_payload(payload, factors.shape, classes, factors.row_scale)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
