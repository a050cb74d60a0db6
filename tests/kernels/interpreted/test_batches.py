"""Batches of many tenants, with rows of the base among them."""

import numpy as np
import pytest
import torch

from tests.kernels.deltas import pack, random_factors, relative_error
from tests.kernels.interpreted.serving import TOLERANCE, Server, check, inputs, serve
from vllm_prinmix.kernels import reference
from vllm_prinmix.kernels.descriptors import Part, SiteTables, whole_tiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 300])
def test_tokens(tokens: int, dtype: torch.dtype) -> None:
    """Above 64 rows, segments of up to 16 rows and longer ones go to different launches."""
    tenants = {s: [random_factors(40, 50, 10 + s, (2,), seed=s)] for s in range(3)}
    slots = np.random.default_rng(0).choice([-1, 0, 1, 1, 1, 1, 1], tokens)
    slots[:2] = 2
    check(serve(tenants, (40,), 50, dtype=dtype), tenants, slots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 64])
def test_tenants(count: int, dtype: torch.dtype) -> None:
    tenants = {s: [random_factors(20, 30, 4 + s % 5, (1 + s % 4,), seed=s)] for s in range(count)}
    slots = np.random.default_rng(1).permutation(np.arange(-1, count))
    check(serve(tenants, (20,), 30, max_tenants=64, dtype=dtype), tenants, slots)


def test_bias_is_added_with_and_without_a_delta() -> None:
    delta, bias = random_factors(30, 40, 4, (2,), seed=10), torch.arange(30.0)
    site = SiteTables((30, 30), 40, 4)
    server = Server(
        site, {0: [pack(delta), None], 1: [None, None]}, biases={0: [bias, bias], 1: [None, bias + 1]}
    )
    x, y = inputs(3, 40, torch.float32), torch.zeros(3, 60)
    server.linear_(y, x, np.array([0, -1, 1]))
    expected = torch.zeros(3, 60, dtype=torch.float64)
    expected[0, :30] = reference.linear(x[:1], delta) + bias
    expected[0, 30:], expected[2, 30:] = bias, bias + 1
    assert relative_error(y, expected) < 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_to_y_and_leaves_base_rows_alone(dtype: torch.dtype) -> None:
    delta = random_factors(50, 60, 8, (2,), seed=11)
    server = serve({1: [delta]}, (50,), 60, dtype=dtype)
    x, base = inputs(4, 60, dtype), torch.randn(4, 50).to(dtype)
    y = base.clone()
    server.linear_(y, x, np.array([-1, 1, -1, 3]))  # slot 3 leaves the site as it is
    assert torch.equal(y[[0, 2, 3]], base[[0, 2, 3]])
    expected = base[1:2].double() + reference.linear(x[1:2], delta)
    assert relative_error(y[1:2], expected) < TOLERANCE[dtype]


def test_base_only_batch() -> None:
    server = serve({1: [random_factors(50, 60, 8, (2,), seed=11)]}, (50,), 60)
    y = torch.zeros(5, 50)
    server.linear_(y, inputs(5, 60, torch.float32), np.full(5, -1))
    assert not y.any()


def test_slots_change_without_new_arguments() -> None:
    first, second = (random_factors(20, 30, n, (2,), seed=n) for n in (3, 40))
    server = serve({0: [first]}, (20,), 30)
    server.workspace = serve({0: [second]}, (20,), 30).workspace
    check(server, {0: [first]}, np.array([0]))
    server.site.put(0, [Part(whole_tiles(pack(second)))], server.arena, 1 << 20)
    check(server, {0: [second]}, np.array([0, -1, 0]))
    server.site.set(0, None)
    check(server, {0: [None]}, np.array([0, -1, 0]))


def test_the_number_of_programs_changes_no_bit() -> None:
    tenants = {s: [random_factors(140, 60, 40, (3,), seed=s)] for s in range(2)}
    slots, x = np.array([0, 1, 0, -1]), inputs(4, 60, torch.bfloat16)
    outputs = []
    for programs in (1, 5):
        y = torch.zeros(4, 140)
        serve(tenants, (140,), 60, dtype=torch.bfloat16, programs=programs).linear_(y, x, slots)
        outputs.append(y)
    assert torch.equal(*outputs)
