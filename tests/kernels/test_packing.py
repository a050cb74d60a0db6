"""The byte layout: what is packed comes back, for every width and every ragged shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prinmix.kernels import packing


def random_codes(directions: int, length: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (directions, length), generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=200)
@given(
    bits=st.integers(1, 8),
    directions=st.integers(0, 70),
    length=st.integers(1, 500),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits: int, directions: int, length: int, seed: int) -> None:
    codes = random_codes(directions, length, bits, seed)
    data = packing.pack(codes, bits)
    assert data.numel() == directions * packing.row_bytes(bits, length)
    assert data.numel() % packing.ALIGNMENT == 0
    assert torch.equal(packing.unpack(data, bits, directions, length), codes)


@settings(deadline=None, max_examples=100)
@given(
    bits=st.integers(1, 8),
    directions=st.integers(1, 40),
    length=st.integers(1, 900),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_slice_of_blocks_is_a_slice_of_codes(
    bits: int, directions: int, length: int, cut: tuple[float, float]
) -> None:
    codes = random_codes(directions, length, bits, 0)
    start = int(min(cut) * (length - 1))
    stop = max(int(max(cut) * length), start + 1)
    first, last = start // packing.BLOCK, packing.blocks(stop)
    data = packing.cut_blocks(
        packing.pack(codes, bits), bits, directions, packing.blocks(length), first, last
    )
    found = packing.unpack(data, bits, directions, stop - start, offset=start - first * packing.BLOCK)
    assert torch.equal(found, codes[:, start:stop])


def test_layout_matches_the_specification_word_by_word() -> None:
    """docs/format.md, "Planes", spelled out with Python integers."""
    directions, length, bits = 18, 200, 3
    codes = random_codes(directions, length, bits, 1)
    expected = bytearray()
    shift = 0
    for width in (2, 1):
        words = 8 * width
        for tile in (range(0, 16), range(16, 18)):
            for block in range(2):
                for j in range(words):
                    for n in tile:
                        word = 0
                        for p in range(16 // width):
                            k = block * 128 + p * words + j
                            code = int(codes[n, k]) if k < length else 0
                            word |= (code >> shift & (1 << width) - 1) << (p * width)
                        expected += word.to_bytes(2, "little")
        shift += width
    assert bytes(packing.pack(codes, bits).numpy()) == bytes(expected)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    codes = torch.full((1, 5), 1 << bits, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"does not fit {bits} bits"):
        packing.pack(codes, bits)


@pytest.mark.parametrize("bits", packing.PLANES)
def test_planes_add_up_to_the_width(bits: int) -> None:
    assert sum(packing.PLANES[bits]) == bits
    assert set(packing.PLANES[bits]) <= {1, 2, 4}
