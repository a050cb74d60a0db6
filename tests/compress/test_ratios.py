"""Any ratio, candidate set and limit of active widths: the budget is kept, and used."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from tests.compress.layers import Layer, make_layer
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.ratio import budget
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import factors_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors

# Ascending; powers of two and others, as fractions and as decimals.
RATIOS = ("1/128", "1/100", "1/64", "0.02", "1/32", "3/80", "0.05", "1/16", "3/40", "1/10", "1/8")
# One pass each: this is about bytes.
METHODS = {"prinmix": PrinMix(alternations=0, clipping=False), "prinmix-paper": Paper(solver="exact")}


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer(192, 256, decay=0.6, outliers=3)


def compress(layer: Layer, method: Method, ratio: str) -> tuple[QuantizedFactors, dict, int]:
    limit = budget(Fraction(ratio), *layer.dw.shape)
    factors, report = method.compress(layer.dw, Hessian(layer.calibration), limit)
    assert isinstance(factors, QuantizedFactors)
    assert size(factors) <= limit
    assert report["solver_gap"] == 0
    return factors, report, limit


def size(factors: QuantizedFactors) -> int:
    return factors_bytes(factors.v_bits.tolist(), factors.u_bits.tolist(), *factors.shape)


def classes(factors: QuantizedFactors) -> set[tuple[int, int]]:
    return set(zip(factors.v_bits.tolist(), factors.u_bits.tolist(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_any_ratio(layer: Layer, name: str) -> None:
    """No room is left for another direction, and more bytes mean less error."""
    errors = []
    for ratio in RATIOS:
        factors, report, limit = compress(layer, METHODS[name], ratio)
        narrowest = min(factors_bytes([v], [u], *factors.shape) for v, u in classes(factors))
        assert 0 <= limit - size(factors) < narrowest + 16, ratio
        errors.append(report["error"])
    assert all(more < less for less, more in pairwise(errors))


@pytest.mark.parametrize("limit", range(1, 7))
def test_at_most_so_many_pairs(layer: Layer, limit: int) -> None:
    factors, report, _ = compress(
        layer, PrinMix(alternations=0, clipping=False, max_active_bits=limit), "1/16"
    )
    assert 1 <= len(classes(factors)) <= limit
    assert report["error"] < 1
    assert 0 < report["solver_bound"] < 1


def test_more_pairs_lower_the_bound(layer: Layer) -> None:
    bounds = [
        compress(layer, PrinMix(alternations=0, clipping=False, max_active_bits=limit), "1/16")[1][
            "solver_bound"
        ]
        for limit in (1, 2, 3, 6)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]


@pytest.mark.parametrize("bits", [(0, 1), (0, 2), (0, 2, 3, 4), (0, 3, 8), (8, 0, 1), (0, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("kind", [PrinMix, Paper])
def test_only_candidates_are_used(layer: Layer, kind: type[PrinMix | Paper], bits: tuple[int, ...]) -> None:
    options = {"alternations": 0} if kind is PrinMix else {"solver": "exact"}
    method = kind(bits=bits, **options)
    method.check()
    factors, _, _ = compress(layer, method, "1/20")
    assert {width for pair in classes(factors) for width in pair} <= set(bits) - {0}


@pytest.mark.parametrize("name", METHODS)
def test_a_rank_penalty_saves_directions(layer: Layer, name: str) -> None:
    directions, errors = [], []
    for penalty in (0.0, 0.1, 0.3, 1.0, 3.0):
        factors, report, _ = compress(layer, replace(METHODS[name], rank_penalty=penalty), "1/16")
        directions.append(factors.directions)
        errors.append(report["error"])
    assert directions == sorted(directions, reverse=True)
    assert directions[-1] < directions[0]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("penalty", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_a_rank_penalty_that_is_none(name: str, penalty: float) -> None:
    with pytest.raises(PrinMixError, match=r"out of range.*\[--rank-penalty\].*0 or more"):
        registry.make(name, rank_penalty=penalty)
