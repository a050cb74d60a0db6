"""A tenant's image: sizes known without weights, shared parts stored once, little besides packed bytes."""

import itertools
from fractions import Fraction

import pytest
import torch

from benchmarks.generate_delta import SHAPES, directions
from benchmarks.layer import sites as layer_sites
from tests.kernels.deltas import pack, random_factors, random_matrix
from vllm_prinmix.backend import Site, SiteDelta, TenantDelta
from vllm_prinmix.format.payload import payload_bytes
from vllm_prinmix.format.schema import Factors
from vllm_prinmix.kernels.packed import PackedFactors
from vllm_prinmix.slot_image import UNIT, lay_out

VOCABULARY, HIDDEN = 200, 96
SITES = [
    Site("embedding", (VOCABULARY,), HIDDEN),
    Site("linear", (64, 32), HIDDEN, (0, 0)),
    Site("norm", (HIDDEN,)),
    Site("linear", (VOCABULARY,), HIDDEN),
]


def tenant(tied: bool) -> TenantDelta:
    embedding = pack(random_factors(VOCABULARY, HIDDEN, 20, (2, 3), seed=0))
    head = embedding if tied else pack(random_factors(VOCABULARY, HIDDEN, 20, (2, 3), seed=1))
    matrix, factors = random_matrix(64, HIDDEN, 2, seed=2), random_factors(32, HIDDEN, 5, (4,), seed=3)
    return {
        0: SiteDelta(parts=[embedding]),
        1: SiteDelta(parts=[pack(matrix), pack(factors)], bias=torch.arange(96.0)),
        2: SiteDelta(weight=torch.ones(HIDDEN)),
        3: SiteDelta(parts=[head]),
    }


def test_everything_has_a_place_of_its_own() -> None:
    image = lay_out(tenant(tied=False), SITES)
    spans = sorted((start, start + tensor.nbytes) for tensor, start in image.tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= image.tables_start <= image.nbytes
    assert all(start % UNIT == 0 for start, _ in spans)


def test_a_tied_head_and_its_embedding_are_stored_once() -> None:
    tied, untied = (lay_out(tenant(t), SITES) for t in (True, False))
    embedding = pack(random_factors(VOCABULARY, HIDDEN, 20, (2, 3), seed=0))
    assert untied.nbytes - tied.nbytes >= embedding.nbytes


def test_written_in_pieces_as_in_one() -> None:
    image = lay_out(tenant(tied=False), SITES)
    whole = torch.zeros(image.tables_start, dtype=torch.uint8)
    image.write([whole])
    for tensor, start in image.tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(whole[start : start + raw.numel()], raw)
    pieces = list(torch.zeros(image.tables_start, dtype=torch.uint8).split(1000))
    image.write(pieces)
    assert torch.equal(torch.cat(pieces), whole)


def test_tables_move_with_the_slot() -> None:
    """Laid out anew behind a dummy tensor, a table has the positions that `Relative.at` gives."""
    image = lay_out(tenant(tied=False), SITES)
    start = 7 * UNIT
    entries = image.entries.at(start)
    assert entries[2] * 4 == image.entries.at_zero[2] * 4 + start  # a norm's weight, in float32
    assert entries[1] * 8 == image.entries.at_zero[1] * 8 + start  # a table, in int64
    without = lay_out({1: tenant(tied=False)[1]}, SITES)
    assert (without.entries.at(start)[[0, 2, 3]] == -1).all()


@pytest.mark.parametrize(
    ("shape", "limit"), [("qwen2.5-0.5b", 1.15), ("qwen2.5-7b", 1.05), ("qwen2.5-14b", 1.05)]
)
def test_a_slot_is_hardly_larger_than_the_packed_bytes(shape: str, limit: float) -> None:
    """One layer at 1/16, without its weights."""
    sites, delta, packed = [], {}, 0
    for number, (rows, cols) in enumerate(layer_sites(SHAPES[shape]).values()):
        sites.append(Site("linear", tuple(rows), cols, (0,) * len(rows)))
        parts = []
        for n in rows:
            spec = Factors(shape=(n, cols), classes=directions(n, cols, Fraction(1, 16)))
            payload = torch.empty(payload_bytes(spec), dtype=torch.uint8, device="meta")
            packed += payload.numel()
            classes = [(c.v_bits, c.u_bits, c.directions) for c in spec.classes]
            parts.append(PackedFactors.from_payload(payload, (n, cols), classes, False))
        delta[number] = SiteDelta(parts=[*parts])
    assert lay_out(delta, sites).nbytes <= limit * packed
