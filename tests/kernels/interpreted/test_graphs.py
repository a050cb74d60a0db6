"""One graph serves every batch of its size: CUDA's on a GPU, a pretended one for interpreted kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton

from tests.kernels.deltas import pack, random_factors, relative_error
from tests.kernels.interpreted.serving import ASM, DEVICE, TOLERANCE, inputs, serve, used_arena
from vllm_prinmix.kernels import reference, segmented
from vllm_prinmix.kernels.descriptors import Part, SiteTables, columns, embedding_part, groups, whole_tiles
from vllm_prinmix.kernels.segments import Segments

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from tests import pretended_graphs
    from tests.pretended_graphs import NotCapturable, PretendedGraph

pretended = pytest.mark.skipif(not INTERPRETED, reason="CUDA's graphs are used")


def captured(step: Callable[[], None]) -> Any:
    graph: Any = PretendedGraph() if INTERPRETED else torch.cuda.CUDAGraph()
    with pretended_graphs.capture(graph) if INTERPRETED else torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("rows", [24, 80])
def test_a_captured_graph_sees_new_batches_and_tenants(rows: int) -> None:
    """24 rows: decode shapes alone; 80: both shapes, whatever the batch. Slot 1 changes hands."""
    dtype = torch.bfloat16
    deltas = {s: [random_factors(300, 700, 40 + 30 * s, (2, 3, 4), seed=s)] for s in range(3)}
    programs = 3 if INTERPRETED else segmented.programs_for(DEVICE)
    server = serve(deltas, (300,), 700, dtype=dtype, programs=programs)
    x, y = inputs(rows, 700, dtype).to(DEVICE), torch.zeros(rows, 300, dtype=dtype, device=DEVICE)

    def step() -> None:
        between = server.site, server.arena, server.segments, server.workspace
        segmented.linear_(y, x, *between, programs, asm=ASM)

    server.segments.set(np.full(rows, -1))
    step()  # compiles
    graph = captured(step)
    new = random_factors(300, 700, 25, (2, 4), seed=9)
    nobody, all_of_one = np.full(rows, -1), np.full(rows, 1)
    padded = np.arange(rows - 5) % 3  # a batch that is shorter than the graph's
    for batch in (np.arange(rows) % 3, padded, nobody, np.sort(np.arange(rows) % 4 - 1), all_of_one):
        if batch is all_of_one:
            server.site.put(1, [Part(whole_tiles(pack(new)))], server.arena, 1 << 20)
            deltas[1] = [new]
        server.segments.set(batch)
        y.zero_()
        graph.replay()
        slots = np.concatenate([batch, np.full(rows - len(batch), -1)])
        assert not y[torch.from_numpy(slots < 0).to(DEVICE)].any()
        for slot in np.unique(batch[batch >= 0]).tolist():
            mine = torch.from_numpy(slots == slot)
            expected = reference.linear(x.cpu()[mine], deltas[slot][0])
            assert relative_error(y.cpu()[mine], expected) < TOLERANCE[dtype]


def test_captured_lookups_see_new_batches_and_tenants() -> None:
    """Embedding and norm; the graph's 6 rows, of which a batch may have fewer."""
    vocabulary, hidden, rows = 90, 64, 6
    factors = [random_factors(vocabulary, hidden, 5, (2, 3), seed=s) for s in range(3)]
    parts = [embedding_part(whole_tiles(pack(f))) for f in factors]
    weights = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    site, arena = SiteTables((hidden,), vocabulary, 2, DEVICE), used_arena(1 << 20)
    segments = Segments(2, rows, DEVICE)
    end = 0
    for slot in range(2):
        end = site.put(slot, parts[slot : slot + 1], arena, end)
    arena.put([weights.view(-1)], 1 << 19)
    places = [(1 << 17) + hidden * i for i in range(3)]  # in float32
    entries = torch.tensor(places[:2], device=DEVICE)
    need = [max(f(p.delta) for p in parts) for f in (columns, groups)]
    between = segmented.Workspace(rows, hidden, *need, dtype=torch.float32, device=DEVICE)
    ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y, normed = torch.zeros(2, rows, hidden, device=DEVICE)

    def step() -> None:
        segmented.embedding_(y, ids, site, arena, segments, between, programs=2, asm=ASM)
        segmented.norm_(normed, x, entries, arena, segments, eps=1e-6)

    segments.set(np.full(rows, -1))
    step()
    graph = captured(step)
    tenants = [0, 1]
    for batch in ([0, 1, -1, 1, 0, 0], [1, 1, 1], [-1, 0, 1, 1, -1, 0]):
        if len(batch) == 3:  # slot 1 changes hands
            site.put(1, parts[2:], arena, 1 << 18)
            entries[1] = places[2]
            tenants[1] = 2
        segments.set(np.array(batch))
        ids.copy_(torch.arange(rows) * 7 + len(batch))
        y.zero_()
        normed.zero_()
        graph.replay()
        for row, slot in enumerate([*batch, *[-1] * (rows - len(batch))]):
            if slot < 0:
                assert not y[row].any()
                assert not normed[row].any()
                continue
            expected = reference.embedding(ids.cpu()[row : row + 1], factors[tenants[slot]])
            assert relative_error(y.cpu()[row : row + 1], expected) < 5e-6
            expected = reference.rms_norm(x.cpu()[row : row + 1], weights[tenants[slot]], 1e-6)
            assert relative_error(normed.cpu()[row : row + 1], expected) < 5e-6


@pretended
def test_a_replay_does_what_was_captured() -> None:
    """With today's values in yesterday's tensors; what Python decided is not decided again."""
    x, out, twice = torch.ones(3), torch.zeros(3), True

    def step() -> None:
        between = x + 1
        out.copy_(between.view(3, 1).mul_(2 if twice else 1)[:, 0])

    graph = captured(step)
    x.fill_(4)
    twice = False
    graph.replay()
    assert out.tolist() == [10.0, 10.0, 10.0]


@pretended
def test_nothing_is_there_before_a_replay() -> None:
    x, found = torch.ones(3), []
    graph = captured(lambda: found.append(x * 2))
    assert found[0].isnan().all()
    graph.replay()
    assert found[0].tolist() == [2.0, 2.0, 2.0]


@pretended
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[[0, 1]],
        lambda x: torch.allclose(x, x),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64)),
        lambda x: torch.accelerator.synchronize(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.from_numpy(np.ones(3, dtype=np.float32)),
    ],
)
def test_what_ends_a_capture(wrong: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(NotCapturable):
        captured(lambda: wrong(torch.ones(3)))
    captured(lambda: None)  # and the next one is not disturbed
