"""`delta-come`: widths by rank, U of each width by itself; and the metrics of its published program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.compress.layers import make_layer
from tests.compress.pairs import Pair
from vllm_prinmix.compress.methods.delta_come import DeltaCome, ranks
from vllm_prinmix.compress.metrics import hessians
from vllm_prinmix.compress.model import build_model, layer_prefix, read_architecture
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.compress.stream import embed, run_layer
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.kernels.packing import factors_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "cols", "ratio", "expected"),
    [
        (4096, 4096, 16, (2, 32)),  # as published
        (11008, 4096, 16, (2, 32)),
        (4096, 4096, 8, (2, 32)),
        (4096, 4096, 32, (1, 16)),
        (256, 256, 16, (1, 2)),
        (256, 256, 32, (1, 1)),
    ],
)
def test_ranks(rows: int, cols: int, ratio: int, expected: tuple[int, int]) -> None:
    limit = 2 * rows * cols // ratio
    counts = ranks(rows, cols, limit, 10**6)
    assert counts[:2] == expected
    bits = [8] * counts[0] + [3] * counts[1] + [2] * counts[2]
    assert factors_bytes(bits, bits, rows, cols) <= limit < factors_bytes([*bits, 2], [*bits, 2], rows, cols)


def test_ranks_published_for_4096() -> None:
    """968 at 2 bits, less those that scales and zero points cost."""
    assert 968 - 8 <= ranks(4096, 4096, 2 * 4096**2 // 16, 4096)[2] <= 968


@pytest.mark.parametrize(("limit", "most", "expected"), [(10**6, 3, (2, 1, 0)), (150, 99, (0, 0, 1))])
def test_ranks_where_there_are_few(limit: int, most: int, expected: tuple[int, int, int]) -> None:
    assert ranks(256, 256, limit, most) == expected


def by_its_definition(dw: torch.Tensor, metrics: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    u, sigma, v = thin_svd(dw)
    total, start = torch.zeros_like(dw), 0
    for bits, count, metric in zip((8, 3, 2), counts, metrics, strict=True):
        width = torch.full((count,), bits, dtype=torch.uint8)
        here = slice(start, start + count)
        v_grid = minmax_grid(v[here], width)
        v_hat = dequantize(gptq(v[here], Hessian(metric), v_grid), v_grid)
        y = sigma[here].diag() @ v_hat  # what U's columns are multiplied with: y X
        u_grid = minmax_grid(u[:, here].T, width)
        codes = gptq(u[:, here], Hessian(y @ metric @ y.T), u_grid, per_column=True)
        total += dequantize(codes.T, u_grid).T @ y
        start += count
    return total


@pytest.mark.parametrize("quirk", [False, True], ids=["own inputs", "quirk"])
def test_against_its_definition(quirk: bool) -> None:
    layer = make_layer(120, 140, outliers=2)
    others = [make_layer(120, 140, seed=seed).calibration for seed in (1, 2, 3)]
    hessian = Hessian(layer.calibration)
    hessian.repeated = tuple(map(Hessian, others))
    factors, report = DeltaCome(delta_come_quirk=quirk).compress(layer.dw, hessian, 2_600)
    counts = [int((factors.v_bits == bits).sum()) for bits in (8, 3, 2)]
    assert min(counts) > 0
    assert torch.equal(factors.v_bits, factors.u_bits)
    expected = by_its_definition(layer.dw, others if quirk else [layer.calibration] * 3, counts)
    assert (factors.dense() - expected).norm() < 0.02 * expected.norm()
    assert 0 < report["error"] < 1


def test_metrics_of_repeated_layers(make_pair: Callable[..., Pair]) -> None:
    """Every layer three times over the samples, each time on what came out before, then the next layer."""
    checkpoint = Checkpoint(make_pair().finetuned)
    model = build_model(read_architecture(checkpoint))
    samples = [torch.arange(9), torch.arange(30, 50)]
    names = [f"{layer_prefix(i)}mlp.down_proj.weight" for i in range(2)]
    found = dict(hessians(model, checkpoint, samples, set(names), CPU, repeats=3))
    plain = dict(hessians(model, checkpoint, samples, set(names), CPU))
    hidden = embed(checkpoint, samples)
    for index, name in enumerate(names):
        assert torch.equal(found[name].matrix, plain[name].matrix)
        assert not plain[name].repeated
        expected = [run_layer(model, checkpoint, index, hidden, {name}, CPU)[name] for _ in range(3)]
        assert len(found[name].repeated) == 3
        for metric, moments in zip(found[name].repeated, expected, strict=True):
            assert torch.equal(metric.matrix, moments)
    first = found[names[0]]
    assert torch.equal(first.repeated[0].matrix, first.matrix)
    assert not torch.allclose(first.repeated[1].matrix, first.matrix, rtol=0.1)


def test_quirk_from_end_to_end(
    make_pair: Callable[..., Pair], compress: Callable[..., str], console: Console, tmp_path: Path
) -> None:
    """Errors are still those on the layers' true inputs."""
    pair = make_pair()
    for quirk in (False, True):
        compress(pair, tmp_path / str(quirk), method=DeltaCome(delta_come_quirk=quirk))
    entries = [
        verify(tmp_path / str(quirk), str(pair.base), str(pair.finetuned), str(pair.calibration), console)
        for quirk in (False, True)
    ]
    assert entries[0] != entries[1]
