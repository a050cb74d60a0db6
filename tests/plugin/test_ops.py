"""The custom ops: the right tenant's delta on the right rows, base rows untouched bit for bit."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.deltas import pack, random_factors, relative_error
from vllm_prinmix import ops
from vllm_prinmix.kernels import reference
from vllm_prinmix.ops import Rows, Site, SiteDelta

COLS = 96


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    ops.reset()
    yield
    ops.reset()


def rows(*groups: tuple[int, list[int]]) -> Rows:
    return Rows([(slot, torch.tensor(indices)) for slot, indices in groups])


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_of_a_packed_layer(dtype: torch.dtype, compiled: bool) -> None:
    """Three slices (q, k, v), of which tenant 1 lacks the second; a bias; a tenant without the site."""
    widths = (64, 32, 32)
    first = [random_factors(w, COLS, 9, (2, 3), seed=w + i) for i, w in enumerate(widths)]
    second = [random_factors(w, COLS, 5, (4,), seed=10 + w + i) for i, w in enumerate(widths)]
    bias = inputs(1, 128, seed=3)[0]
    ops.sites.append(
        Site(
            widths,
            [
                SiteDelta(parts=[pack(d) for d in first], bias=bias),
                SiteDelta(parts=[pack(second[0]), None, pack(second[2])]),
                None,
            ],
        )
    )
    for delta in ops.sites[0].slots[:2] if compiled else []:
        delta.prepare(widths)
        assert delta.compiled is not None
    ops.step.tokens = rows((0, [1, 4, 5]), (1, [2]), (2, [3]))
    x, y = inputs(7, COLS).to(dtype), inputs(7, 128, seed=1).to(dtype)
    before = y.clone()
    torch.ops.prinmix.linear_(y, x, 0)
    for untouched in (0, 3, 6):
        assert torch.equal(y[untouched], before[untouched])
    bound = 2e-6 if dtype == torch.float32 else 5e-3
    a, b = [1, 4, 5], [2]
    expected = before[a].double() + bias + torch.cat([reference.linear(x[a], d) for d in first], dim=1)
    assert relative_error(y[a], expected) < bound
    parts = [reference.linear(x[b], d) for d in second]
    parts[1] = torch.zeros_like(parts[1])
    assert relative_error(y[b], before[b].double() + torch.cat(parts, dim=1)) < bound


def test_a_padded_vocabulary_gets_nothing_in_its_padding() -> None:
    delta = random_factors(40, COLS, 6, (3,), seed=0)
    ops.sites.append(Site((64,), [SiteDelta(parts=[pack(delta)])]))
    ops.step.samples = rows((0, [0, 1]))
    x, y = inputs(2, COLS), torch.zeros(2, 64)
    torch.ops.prinmix.logits_(y, x, 0)
    assert relative_error(y[:, :40], reference.linear(x, delta)) < 1e-6
    assert torch.equal(y[:, 40:], torch.zeros(2, 24))


def test_no_tenants_change_nothing() -> None:
    ops.sites.append(Site((8,), [SiteDelta(parts=[pack(random_factors(8, COLS, 3, (2,), seed=0))])]))
    y = inputs(3, 8)
    before = y.clone()
    torch.ops.prinmix.linear_(y, inputs(3, COLS), 0)
    assert torch.equal(y, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_embedding_adds_nothing_outside_the_table(compiled: bool) -> None:
    delta = random_factors(50, COLS, 6, (3,), seed=0)
    found = SiteDelta(parts=[pack(delta)])
    if compiled:
        found.prepare((50,), transposed=True)
        assert found.compiled is not None
    ops.sites.append(Site((50,), [found]))
    ops.step.tokens = rows((0, [0, 1, 3]))
    y = torch.zeros(4, COLS)
    torch.ops.prinmix.embedding_(y, torch.tensor([49, 63, 7, 0]), 0)
    expected = reference.embedding(torch.tensor([49, 0]), delta)
    assert relative_error(y[[0, 3]], expected) < 1e-6
    assert torch.equal(y[[1, 2]], torch.zeros(2, COLS))


def test_a_tenant_that_overflows_stays_finite() -> None:
    """NaN in one tenant's KV blocks would reach whoever gets the blocks next."""
    delta = random_factors(32, COLS, 6, (3,), seed=0)
    ops.sites.append(Site((32,), [SiteDelta(parts=[pack(delta)])]))
    ops.sites.append(Site((0,), [SiteDelta(weight=torch.full((COLS,), 3e38))]))
    ops.step.tokens = rows((0, [0, 1]))
    x = inputs(3, COLS)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = torch.zeros(3, 32, dtype=dtype)
        torch.ops.prinmix.linear_(y, x.to(dtype), 0)
        assert torch.isfinite(y).all()
        y = torch.zeros(3, COLS, dtype=dtype)
        torch.ops.prinmix.norm_(y, x.to(dtype), 1, 1e-6)
        assert torch.isfinite(y).all()


def test_norm_replaces_the_weight() -> None:
    weight = inputs(1, 16, seed=5)[0]
    ops.sites.append(Site((0,), [SiteDelta(weight=weight), SiteDelta()]))
    ops.step.tokens = rows((0, [1]), (1, [2]))
    x, y = inputs(3, 64).view(3, 4, 16), torch.zeros(3, 4, 16)
    torch.ops.prinmix.norm_(y, x, 0, 1e-6)
    assert relative_error(y[1], reference.rms_norm(x[1], weight, 1e-6)) < 1e-6
    assert torch.equal(y[[0, 2]], torch.zeros(2, 4, 16))


def test_logits_see_sampled_rows_and_prompt_rows() -> None:
    """Sampled: one row a request. Prompt log-probs: views of the token rows, found by their address."""
    delta = random_factors(40, COLS, 6, (3,), seed=0)
    ops.sites.append(Site((40,), [SiteDelta(parts=[pack(delta)])]))
    ops.step.tokens, ops.step.samples = rows((0, [2, 3, 4])), rows((0, [1]))
    hidden = inputs(6, COLS)
    full = reference.linear(hidden, delta)

    y = torch.zeros(2, 40)
    torch.ops.prinmix.logits_(y, hidden[[1, 4]], 0)
    assert torch.equal(y[0], torch.zeros(40))
    assert relative_error(y[1], full[4]) < 1e-6

    ops.step.prompt_hidden = hidden
    y = torch.zeros(3, 40)
    torch.ops.prinmix.logits_(y, hidden[3:6], 0)
    assert relative_error(y[:2], full[3:5]) < 1e-6
    assert torch.equal(y[2], torch.zeros(40))


def test_ops_are_registered_for_compilation() -> None:
    """torch.library's own check of schema, mutation and fake implementation."""
    ops.sites.append(Site((8,), [SiteDelta(parts=[pack(random_factors(8, COLS, 3, (2,), seed=0))])]))
    ops.step.tokens = rows((0, [0]))
    torch.library.opcheck(torch.ops.prinmix.linear_, (inputs(2, 8), inputs(2, COLS), 0))
