"""Payloads: factors and matrices through bytes and back; the size on disk is the size that is promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.deltas import random_factors, random_matrix
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.payload import decode, encode_factors, encode_matrix, payload_bytes
from vllm_prinmix.format.schema import Factors
from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    directions=st.integers(0, 40),
    widths=st.sets(st.integers(1, 8), min_size=1).map(tuple),
    row_scale=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_factors_round_trip(
    rows: int, cols: int, directions: int, widths: tuple[int, ...], row_scale: bool, seed: int
) -> None:
    delta = random_factors(rows, cols, directions, widths, seed, row_scale)
    spec, payload = encode_factors(delta)
    assert (
        payload.numel()
        == payload_bytes(spec)
        == packing.factors_bytes(delta.v_bits.tolist(), delta.u_bits.tolist(), rows, cols, row_scale)
    )
    found = decode(spec, payload)
    assert isinstance(found, QuantizedFactors)
    order = torch.argsort(delta.v_bits.long() * 16 + delta.u_bits.long(), descending=True, stable=True)
    for name in ("v_codes", "u_codes", "v_bits", "u_bits", "scale", "v_zero", "u_zero"):
        assert torch.equal(getattr(found, name), getattr(delta, name)[order]), name
    assert (found.row_scale is None) == (not row_scale)
    if delta.row_scale is not None and found.row_scale is not None:
        assert torch.equal(found.row_scale, delta.row_scale)
    assert torch.allclose(found.dense(), delta.dense(), atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_matrix_round_trip(bits: int) -> None:
    delta = random_matrix(33, 150, bits, seed=bits)
    spec, payload = encode_matrix(delta)
    assert payload.numel() == payload_bytes(spec)
    found = decode(spec, payload)
    assert isinstance(found, QuantizedMatrix)
    assert found.bits == bits
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found, name), getattr(delta, name)), name


def test_classes_are_contiguous_and_widest_first() -> None:
    spec, _ = encode_factors(random_factors(20, 20, 50, (1, 2, 3), seed=0))
    widths = [(c.v_bits, c.u_bits) for c in spec.classes]
    assert widths == sorted(set(widths), reverse=True)


def test_a_payload_of_another_size_is_refused() -> None:
    spec, payload = encode_factors(random_factors(20, 20, 5, (2,), seed=0))
    with pytest.raises(PrinMixError, match="another size"):
        decode(spec, payload[:-1])
    with pytest.raises(PrinMixError, match="another size"):
        decode(Factors(shape=(20, 21 + packing.BLOCK), classes=spec.classes), payload)
