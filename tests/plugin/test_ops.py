"""The custom ops: the right tenant's delta on the right rows, base rows untouched bit for bit.

On every backend that can run here: compiled CPU kernels, torch's operators, and, where Triton was imported
with TRITON_INTERPRET=1 (test_interpreted_ops.py), the Triton kernels.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.kernels.deltas import pack, random_factors, random_matrix, relative_error
from vllm_prinmix import ops
from vllm_prinmix.backend import Backend, Site, SiteDelta
from vllm_prinmix.cpu_backend import CpuBackend
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels import native, reference

COLS = 96
HEAD = Site("linear", (40,), COLS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOAT32 = torch.float32
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-3}

Serve = Callable[..., Backend]


@pytest.fixture(params=["triton"] if INTERPRETED else ["compiled", "torch"])
def serve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """serve((site, tenants' deltas there), ..., dtype=...): a backend with deltas in slots 0, 1, ..."""

    def start(*sites: tuple[Site, list[SiteDelta | None]], dtype: torch.dtype = FLOAT32) -> Backend:
        tenants = max(len(deltas) for _, deltas in sites)
        backend: Backend
        if request.param == "triton":
            from vllm_prinmix import triton_backend

            monkeypatch.setattr(triton_backend, "PIECE", 1000)  # a delta here has several
            backend = triton_backend.TritonBackend(tenants, 32, dtype, torch.device("cpu"))
        else:
            backend = CpuBackend(tenants)
        for site, _ in sites:
            backend.add_site(site)
        found = [
            {n: deltas[i] for n, (_, deltas) in enumerate(sites) if i < len(deltas) and deltas[i] is not None}
            for i in range(tenants)
        ]
        backend.reserve(found)
        for slot, delta in enumerate(found):
            backend.activate(slot, backend.prepare(delta))
        ops.use(backend)
        return backend

    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    yield start
    ops.use(None)


def batch(backend: Backend, tokens: list[int], samples: list[int] | None = None) -> None:
    """The slot of every row, -1 for the base's."""
    backend.set_batch(np.array(tokens), np.array(samples or []), active=True)


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_of_a_packed_layer(dtype: torch.dtype, serve: Serve) -> None:
    """Three slices (q, k, v), of which tenant 1 lacks the second; a bias; a tenant without the site."""
    widths = (64, 32, 32)
    first = [random_factors(w, COLS, 9, (2, 3), seed=w + i) for i, w in enumerate(widths)]
    second = [random_factors(w, COLS, 5, (4,), seed=10 + w + i) for i, w in enumerate(widths)]
    bias = inputs(1, 128, seed=3)[0]
    backend = serve(
        (
            Site("linear", widths, COLS, (0, 0, 0)),
            [
                SiteDelta(parts=[pack(d) for d in first], bias=bias),
                SiteDelta(parts=[pack(second[0]), None, pack(second[2])]),
                None,
            ],
        ),
        dtype=dtype,
    )
    batch(backend, [-1, 0, 1, 2, 0, 0, -1])
    x, y = inputs(7, COLS).to(dtype), inputs(7, 128, seed=1).to(dtype)
    before = y.clone()
    torch.ops.prinmix.linear_(y, x, 0)
    for untouched in (0, 3, 6):
        assert torch.equal(y[untouched], before[untouched])
    bound = TOLERANCE[dtype]
    a, b = [1, 4, 5], [2]
    expected = before[a].double() + bias + torch.cat([reference.linear(x[a], d) for d in first], dim=1)
    assert relative_error(y[a], expected) < bound
    parts = [reference.linear(x[b], d) for d in second]
    parts[1] = torch.zeros_like(parts[1])
    assert relative_error(y[b], before[b].double() + torch.cat(parts, dim=1)) < bound


def test_a_padded_vocabulary_gets_nothing_in_its_padding(serve: Serve) -> None:
    delta = random_factors(40, COLS, 6, (3,), seed=0)
    batch(serve((HEAD, [SiteDelta(parts=[pack(delta)])])), [], [0, 0])
    x, y = inputs(2, COLS), torch.zeros(2, 64)
    torch.ops.prinmix.logits_(y, x, 0)
    assert relative_error(y[:, :40], reference.linear(x, delta)) < 1e-6
    assert torch.equal(y[:, 40:], torch.zeros(2, 24))


def test_no_tenants_change_nothing(serve: Serve) -> None:
    delta = SiteDelta(parts=[pack(random_factors(8, COLS, 3, (2,), seed=0))])
    backend = serve((Site("linear", (8,), COLS), [delta]))
    batch(backend, [0, 0, 0])
    backend.set_batch(np.array([-1, -1, -1]), np.array([-1]), active=False)
    y = inputs(3, 8)
    before = y.clone()
    torch.ops.prinmix.linear_(y, inputs(3, COLS), 0)
    assert torch.equal(y, before)


def test_embedding_adds_nothing_outside_the_table(serve: Serve) -> None:
    delta = random_factors(50, COLS, 6, (3,), seed=0)
    backend = serve((Site("embedding", (50,), COLS), [SiteDelta(parts=[pack(delta)])]))
    batch(backend, [0, 0, -1, 0])
    y = torch.zeros(4, COLS)
    torch.ops.prinmix.embedding_(y, torch.tensor([49, 63, 7, 0]), 0)
    expected = reference.embedding(torch.tensor([49, 0]), delta)
    assert relative_error(y[[0, 3]], expected) < 1e-6
    assert torch.equal(y[[1, 2]], torch.zeros(2, COLS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tenant_that_overflows_stays_finite(dtype: torch.dtype, serve: Serve) -> None:
    """NaN in one tenant's KV blocks would reach whoever gets the blocks next."""
    delta = random_factors(32, COLS, 6, (3,), seed=0)
    backend = serve(
        (Site("linear", (32,), COLS), [SiteDelta(parts=[pack(delta)])]),
        (Site("norm", (COLS,)), [SiteDelta(weight=torch.full((COLS,), 3e38))]),
        (Site("linear", (COLS,), COLS), [SiteDelta(parts=[pack(random_matrix(COLS, COLS, 2, seed=0))])]),
        dtype=dtype,
    )
    batch(backend, [0, 0, -1])
    x = inputs(3, COLS)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    for op, width, *more in (
        (torch.ops.prinmix.linear_, 32, 0),
        (torch.ops.prinmix.norm_, COLS, 1, 1e-6),
        (torch.ops.prinmix.linear_, COLS, 2),
    ):
        y = torch.zeros(3, width, dtype=dtype)
        op(y, x.to(dtype), *more)
        assert torch.isfinite(y).all()
        assert not y[2].any()


def test_norm_replaces_the_weight(serve: Serve) -> None:
    weight = inputs(1, 16, seed=5)[0]
    batch(serve((Site("norm", (16,)), [SiteDelta(weight=weight), None])), [-1, 0, 1])
    x, y = inputs(3, 64).view(3, 4, 16), torch.zeros(3, 4, 16)
    torch.ops.prinmix.norm_(y, x, 0, 1e-6)
    assert relative_error(y[1], reference.rms_norm(x[1], weight, 1e-6)) < 1e-6
    assert torch.equal(y[[0, 2]], torch.zeros(2, 4, 16))


def test_logits_see_sampled_rows_and_prompt_rows(serve: Serve) -> None:
    """Sampled: one row a request. Prompt log-probs: views of the token rows, found by their address."""
    delta = random_factors(40, COLS, 6, (3,), seed=0)
    backend = serve((HEAD, [SiteDelta(parts=[pack(delta)])]))
    batch(backend, [-1, -1, 0, 0, 0, -1], [-1, 0])
    hidden = inputs(6, COLS)
    full = reference.linear(hidden, delta)

    y = torch.zeros(2, 40)
    torch.ops.prinmix.logits_(y, hidden[[1, 4]], 0)
    assert torch.equal(y[0], torch.zeros(40))
    assert relative_error(y[1], full[4]) < 1e-6

    backend.prompt_hidden = hidden
    y = torch.zeros(3, 40)
    torch.ops.prinmix.logits_(y, hidden[3:6], 0)
    assert relative_error(y[:2], full[3:5]) < 1e-6
    assert torch.equal(y[2], torch.zeros(40))


def test_ops_are_registered_for_compilation(serve: Serve) -> None:
    """torch.library's own check of schema, mutation and fake implementation."""
    delta = SiteDelta(parts=[pack(random_factors(8, COLS, 3, (2,), seed=0))])
    batch(serve((Site("linear", (8,), COLS), [delta])), [0, -1])
    torch.library.opcheck(torch.ops.prinmix.linear_, (inputs(2, 8), inputs(2, COLS), 0))


def test_a_slot_can_be_given_away(serve: Serve) -> None:
    """What another tenant left in a slot is gone, at sites that the new one does not change too."""
    first, second = (random_factors(40, COLS, 6, bits, seed=n) for n, bits in enumerate([(3,), (2,)]))
    weight = inputs(1, COLS, seed=5)[0]
    backend = serve(
        (HEAD, [SiteDelta(parts=[pack(first)], bias=torch.ones(40))]),
        (Site("norm", (COLS,)), [SiteDelta(weight=weight)]),
    )
    backend.deactivate(0)
    backend.activate(0, backend.prepare({0: SiteDelta(parts=[pack(second)])}))
    batch(backend, [0, -1])
    x = inputs(2, COLS)
    y, normed = torch.zeros(2, 40), torch.zeros(2, COLS)
    torch.ops.prinmix.linear_(y, x, 0)
    torch.ops.prinmix.norm_(normed, x, 1, 1e-6)
    assert relative_error(y[:1], reference.linear(x[:1], second)) < TOLERANCE[FLOAT32]
    assert not normed.any()


@pytest.mark.skipif(not INTERPRETED, reason="slots of fixed size are the Triton backend's")
def test_a_delta_too_large_for_its_slot_is_refused(serve: Serve) -> None:
    small, large = (SiteDelta(parts=[pack(random_factors(40, COLS, n, (3,), seed=0))]) for n in (6, 70))
    backend = serve((HEAD, [small]))
    with pytest.raises(PrinMixError, match="more than 5% larger than any"):
        backend.prepare({0: large})


@pytest.mark.skipif(not INTERPRETED, reason="the CPU's backend has no such limit")
def test_a_delta_of_modules_that_no_graph_reckons_with_is_refused(serve: Serve) -> None:
    delta = SiteDelta(parts=[pack(random_factors(40, COLS, 6, (3,), seed=0))])
    backend = serve((HEAD, [delta]), (HEAD, [None]))
    with pytest.raises(PrinMixError, match="no delta changed when the server started"):
        backend.prepare({1: delta})


def test_a_tensor_parallel_slice(serve: Serve) -> None:
    """Rows and columns that start within a block of 128."""
    delta = random_factors(300, 400, 6, (2,), seed=0)
    whole = pack(delta)
    (row, last_row), (col, last_col) = (150, 300), (200, 400)
    part = whole.slice_rows(row, last_row).slice_cols(col, last_col)
    site = Site("linear", (last_row - row,), last_col - col, (row % 128,), col % 128)
    batch(serve((site, [SiteDelta(parts=[part])])), [0, -1])
    x, y = inputs(2, last_col - col), torch.zeros(2, last_row - row)
    torch.ops.prinmix.linear_(y, x, 0)
    padded = torch.zeros(1, 400)
    padded[:, col:last_col] = x[:1]
    assert relative_error(y[:1], reference.linear(padded, delta)[:, row:last_row]) < TOLERANCE[FLOAT32]
    assert not y[1].any()
