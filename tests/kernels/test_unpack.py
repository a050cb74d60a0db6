"""What the inline assembly relies on: a 32-bit shift of two lanes soils no bit that the mask keeps."""

import pytest
import torch

from vllm_prinmix.kernels import unpack


@pytest.mark.parametrize("mantissa", [7, 10], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_two_lanes_in_one_register(width: int, mantissa: int) -> None:
    words = torch.randint(0, 1 << 16, (2, 1000), generator=torch.Generator().manual_seed(0))
    pairs = words[0] | words[1] << 16
    for field in range(16 // width):
        offset = unpack.offset(field * width, width)
        bit = mantissa - (offset.bit_length() - 1)
        left = bit - width * field
        shifted = (pairs << left if left >= 0 else pairs >> -left) & 0xFFFFFFFF
        mask = (1 << width) - 1
        for lane, word in enumerate(words):
            found = (shifted >> (16 * lane + bit)) & mask
            assert torch.equal(found, (word >> (width * field)) & mask)
        assert bit + width <= mantissa
        # The number that the mantissa makes: 2^exponent (1 + code 2^(bit - mantissa)) with unit steps.
        assert offset == 1 << (mantissa - bit)
        assert offset <= 64
