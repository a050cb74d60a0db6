"""What only a GPU shows: the kernels in CUDA graphs, and at the sizes of a 7B model.

The same comparisons as the interpreter's run here too, compiled: see interpreted/conftest.py.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def test_a_captured_graph_sees_new_batches_and_tenants() -> None:
    from tests.kernels.deltas import pack, random_factors, relative_error
    from tests.kernels.interpreted.serving import ASM, DEVICE, TOLERANCE, inputs, serve
    from vllm_prinmix.kernels import reference, segmented
    from vllm_prinmix.kernels.descriptors import Part, whole_tiles

    dtype = torch.bfloat16
    deltas = {s: [random_factors(300, 700, 40 + 30 * s, (2, 3, 4), seed=s)] for s in range(3)}
    server = serve(deltas, (300,), 700, dtype=dtype)
    x, y = inputs(24, 700, dtype).to(DEVICE), torch.zeros(24, 300, dtype=dtype, device=DEVICE)
    programs = segmented.programs_for(DEVICE)

    def step() -> None:
        between = server.site, server.arena, server.segments, server.workspace
        segmented.linear_(y, x, *between, programs, asm=ASM)

    server.segments.set(np.full(24, -1))
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    new = random_factors(300, 700, 25, (2, 4), seed=9)
    for batch in (np.arange(24) % 3, np.full(24, -1), np.sort(np.arange(24) % 4 - 1), np.full(24, 1)):
        if (batch == 1).all():
            server.site.put(1, [Part(whole_tiles(pack(new)))], server.arena, 1 << 20)
            deltas[1] = [new]
        server.segments.set(batch)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert not y[torch.from_numpy(batch < 0).to(DEVICE)].any()
        for slot in np.unique(batch[batch >= 0]).tolist():
            mine = torch.from_numpy(batch == slot)
            expected = reference.linear(x.cpu()[mine], deltas[slot][0])
            assert relative_error(y.cpu()[mine], expected) < TOLERANCE[dtype]


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
