"""Embeddings and norms against the reference."""

import numpy as np
import pytest
import torch

from tests.kernels.deltas import pack, random_factors, random_matrix, relative_error
from tests.kernels.interpreted.serving import ASM, DEVICE, TOLERANCE, used_arena
from vllm_prinmix.kernels import reference, segmented
from vllm_prinmix.kernels.descriptors import SiteTables, columns, embedding_part, groups, whole_tiles
from vllm_prinmix.kernels.packed import Packed
from vllm_prinmix.kernels.segments import Segments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def embed(
    deltas: dict[int, Packed], ids: torch.Tensor, slots: list[int], dtype: torch.dtype, vocabulary: int
) -> torch.Tensor:
    """float32 [rows, hidden]: what the tenants' deltas add."""
    first = next(iter(deltas.values()))
    hidden = first.cols.length
    most = max(4, *(slot + 1 for slot in deltas))
    site = SiteTables((hidden,), vocabulary, most, DEVICE, col_offset=first.rows.offset)
    arena, segments = used_arena(1 << 20), Segments(most, 300, DEVICE)
    end, parts = 0, []
    for slot, delta in deltas.items():
        parts.append(embedding_part(whole_tiles(delta)))
        end = site.put(slot, parts[-1:], arena, end)
    need = [max(f(p.delta) for p in parts) for f in (columns, groups)]
    workspace = segmented.Workspace(300, hidden, *need, dtype=dtype, device=DEVICE)
    segments.set(np.array(slots))
    y = torch.zeros(len(ids), hidden, device=DEVICE)
    segmented.embedding_(y, ids.to(DEVICE), site, arena, segments, workspace, programs=2, asm=ASM)
    return y.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(1,), (2, 4), (3,), (7, 8)], ids=str)
def test_embedding(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    deltas = {s: random_factors(300, 140, 30, widths, seed=s, row_scale=s == 1) for s in (1, 3)}
    slots = [1, -1, 3, 1, 1, 3]
    ids = torch.tensor([0, 5, 299, 128, 127, 64])
    y = embed({s: pack(d) for s, d in deltas.items()}, ids, slots, dtype, 300)
    assert not y[1].any()
    for slot, delta in deltas.items():
        mine = torch.tensor(slots) == slot
        assert relative_error(y[mine], reference.embedding(ids[mine], delta)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "tenants"), [(1, 1), (64, 3), (65, 3), (300, 2), (65, 64)])
def test_embeddings_of_batches(tokens: int, tenants: int, dtype: torch.dtype) -> None:
    deltas = {s: random_factors(90, 60, 4 + s % 5, (1 + s % 4,), seed=s) for s in range(tenants)}
    slots = np.random.default_rng(1).permutation(np.arange(tokens) % (tenants + 1) - (tokens > 1))
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 90, tokens))
    y = embed({s: pack(d) for s, d in deltas.items()}, ids, slots.tolist(), dtype, 90)
    assert not y[torch.from_numpy(slots < 0)].any()
    for slot in np.unique(slots[slots >= 0]).tolist():
        mine = torch.from_numpy(slots == slot)
        assert relative_error(y[mine], reference.embedding(ids[mine], deltas[slot])) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding_without_svd(bits: int) -> None:
    delta = random_matrix(200, 600, bits, seed=bits)
    ids = torch.tensor([0, 199, 17, 200, 64])
    y = embed({2: pack(delta)}, ids, [2, 2, -1, 2, 2], torch.bfloat16, 200)
    assert not y[2:4].any()
    kept = torch.tensor([0, 1, 4])
    assert relative_error(y[kept], reference.embedding(ids[kept], delta)) < 5e-6


def test_embedding_shard() -> None:
    """A vocabulary shard that begins inside a block; ids of other shards add nothing."""
    delta = random_factors(300, 60, 20, (2, 3), seed=1, row_scale=True)
    shard = pack(delta).slice_rows(150, 290)
    ids = torch.tensor([0, 139, 140, -1, 7])
    y = embed({0: shard}, ids, [0] * 5, torch.float32, 140)
    assert not y[2:4].any()
    kept = torch.tensor([0, 1, 4])
    assert relative_error(y[kept], reference.embedding(ids[kept] + 150, delta)) < 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 200), (5, 3, 64)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape[-1], generator=generator)
    arena, segments = used_arena(4096), Segments(4, 8, DEVICE)
    arena.put([weight], 16)
    x, y = torch.randn(*shape, generator=generator).to(dtype), torch.ones(*shape, dtype=dtype)
    slots = np.array([1, -1, 2, 1, -1])
    segments.set(slots)
    weights = torch.tensor([-1, 4, -1, -1], device=DEVICE)
    y_there = y.to(DEVICE)
    segmented.norm_(y_there, x.to(DEVICE), weights, arena, segments, eps=1e-6)
    y.copy_(y_there)
    mine = torch.from_numpy(slots == 1)
    expected = reference.rms_norm(x[mine], weight, 1e-6)
    assert relative_error(y[mine], expected) < TOLERANCE[dtype]
    assert torch.equal(y[~mine], torch.ones_like(y[~mine]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "tenants"), [(1, 1), (300, 2), (65, 64)])
def test_norms_of_batches(tokens: int, tenants: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(tenants, 64, generator=generator)
    arena, segments = used_arena(1 << 16), Segments(tenants, 300, DEVICE)
    arena.put([weights.view(-1)], 0)
    slots = np.random.default_rng(1).permutation(np.arange(tokens) % (tenants + 1) - (tokens > 1))
    segments.set(slots)
    x, y = torch.randn(tokens, 64, generator=generator).to(dtype), torch.ones(tokens, 64, dtype=dtype)
    places, y_there = torch.arange(tenants, device=DEVICE) * 64, y.to(DEVICE)
    segmented.norm_(y_there, x.to(DEVICE), places, arena, segments, eps=1e-6)
    y.copy_(y_there)
    for slot in np.unique(slots).tolist():
        mine = torch.from_numpy(slots == slot)
        if slot < 0:
            assert torch.equal(y[mine], torch.ones_like(y[mine]))
        else:
            expected = reference.rms_norm(x[mine], weights[slot], 1e-6)
            assert relative_error(y[mine], expected) < TOLERANCE[dtype]
