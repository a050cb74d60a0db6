"""The two products against the reference: widths, ragged shapes, parts, slices."""

import numpy as np
import pytest
import torch

from tests.kernels.deltas import pack, random_factors, random_matrix, relative_error
from tests.kernels.interpreted.serving import TOLERANCE, Server, check, inputs, serve
from vllm_prinmix.kernels import reference
from vllm_prinmix.kernels.descriptors import SiteTables
from vllm_prinmix.kernels.packed import PackedFactors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits: int, dtype: torch.dtype) -> None:
    tenants = {1: [random_factors(130, 200, 20, (bits,), seed=bits)]}
    check(serve(tenants, (130,), 200, dtype=dtype), tenants, np.array([1, -1, 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_of_v_and_u_differ(dtype: torch.dtype) -> None:
    tenants = {0: [random_factors(150, 140, 30, (2, 3, 8), seed=1, row_scale=True)]}
    check(serve(tenants, (150,), 140, dtype=dtype), tenants, np.array([0, 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("directions", [0, 1, 15, 16, 17, 63, 64, 65, 200, 1500])
def test_ragged_directions(directions: int, dtype: torch.dtype) -> None:
    tenants = {2: [random_factors(60, 70, directions, (2,), seed=2)]}
    if directions:
        check(serve(tenants, (60,), 70, dtype=dtype), tenants, np.array([2, 2, -1]))
    else:
        server = serve(tenants, (60,), 70)
        y = torch.ones(1, 60)
        server.linear_(y, inputs(1, 70, torch.float32), np.array([2]))
        assert torch.equal(y, torch.ones(1, 60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(700, 40), (40, 1200), (513, 130), (1, 129)], ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tenants = {0: [random_factors(*shape, 9, (3,), seed=3)]}
    check(serve(tenants, shape[:1], shape[1], dtype=dtype), tenants, np.array([0]))


def test_parts_of_a_packed_layer() -> None:
    """q, k, v; a tenant may leave a part as it is; a part may be stored without SVD."""
    widths = (200, 72, 70)
    tenants = {
        0: [random_factors(w, 60, 18, (2, 3), seed=w, row_scale=w == 72) for w in widths],
        1: [None, random_factors(72, 60, 5, (4,), seed=9), None],
        2: [random_factors(200, 60, 3, (2,), seed=5), random_matrix(72, 60, 5, seed=6), None],
        3: [None, None, random_matrix(70, 60, 3, seed=7)],
    }
    check(serve(tenants, widths, 60), tenants, np.array([3, 0, 2, -1, 1, 0, 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix(dtype: torch.dtype) -> None:
    tenants = {0: [random_matrix(150, 140, 4, seed=8)]}
    check(serve(tenants, (150,), 140, dtype=dtype), tenants, np.array([0, 0, -1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_for_tensor_parallelism(dtype: torch.dtype) -> None:
    """Slices begin inside a block: an offset of rows (U) and of columns (V)."""
    delta = random_factors(300, 330, 12, (2, 3), seed=12, row_scale=True)
    whole = pack(delta)
    assert isinstance(whole, PackedFactors)
    x = inputs(2, 330, dtype)
    rows = whole.slice_rows(70, 260)
    site = SiteTables((190,), 330, 4, row_offsets=(rows.rows.offset,))
    y = torch.zeros(2, 190)
    Server(site, {0: [rows]}, dtype=dtype).linear_(y, x, np.array([0, 0]))
    assert relative_error(y, reference.linear(x, delta)[:, 70:260]) < TOLERANCE[dtype]

    y = torch.zeros(2, 300)
    for a, b in ((0, 140), (140, 330)):
        cols = whole.slice_cols(a, b)
        site = SiteTables((300,), b - a, 4, col_offset=cols.cols.offset)
        Server(site, {0: [cols]}, dtype=dtype).linear_(y, x[:, a:b], np.array([0, 0]))
    assert relative_error(y, reference.linear(x, delta)) < 2 * TOLERANCE[dtype]
