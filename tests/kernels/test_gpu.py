"""What only a GPU shows: the kernels at the sizes of a 7B model.

The interpreter's comparisons run there too, compiled, and in CUDA graphs: see interpreted/conftest.py.
"""

from fractions import Fraction

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_layer_of_a_7b_model(tokens: int) -> None:
    """Against dense bfloat16 weights; the second copy checks places beyond the first."""
    from benchmarks.bench_gpu import difference
    from benchmarks.contenders_gpu import Batch, Dense, Ours
    from benchmarks.layer import Case

    batch = Batch(Case("qwen2.5-7b", 3, tokens, Fraction(1, 16)), torch.device("cuda"))
    found = []
    for contender, copy in ((Dense(batch, 1), 0), (Ours(batch, 2), 1)):
        for y in batch.outputs:
            y.zero_()
        contender.add(copy)
        found.append([y.float() for y in batch.outputs])
    assert difference(found[1], found[0]) < 0.02
