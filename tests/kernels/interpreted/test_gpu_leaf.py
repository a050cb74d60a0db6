"""GPTQ's columns, many in one launch, against the plain loop."""

import pytest
import torch

from tests.kernels.interpreted.serving import DEVICE
from vllm_prinmix.compress.quantization import gptq, gpu_leaf
from vllm_prinmix.compress.quantization.grid import Grid, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 32), (7, 30), (40, 72), (99, 100)])
@pytest.mark.parametrize("n", [1, 32, 77])
def test_span_equals_the_plain_loop(n: int, start: int, stop: int, per_column: bool) -> None:
    size, random = 100, torch.Generator().manual_seed(n + start)
    weight = 2.5 + 2 * torch.randn(size, n, generator=random)
    target = weight + torch.randn(size, n, generator=random)
    factor = (0.3 * torch.randn(size, size, generator=random)).tril(-1) + torch.eye(size)
    widths = torch.randint(1, 9, (size, 1) if per_column else (1, n), generator=random)
    top = (2.0**widths - 1).expand(size, n)
    found, expected = [], []
    for work, device, results in ((gpu_leaf.leaf, DEVICE, found), (gptq.leaf, "cpu", expected)):
        parts = [weight.to(device), target.to(device, copy=True)]
        parts += [torch.full((size, n), -7.0, device=device) for _ in range(2)]  # error, codes
        work(*parts, factor.to(device), top.to(device), start, stop)
        results.extend(part.cpu() for part in parts[1:])
    # A sum on the edge between two codes may round either way, and what follows it then differs: few rows.
    same = (found[2] == expected[2]).all(dim=0)
    assert same.all() or (n > 32 and same.sum() >= n - 1)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one[:, same], other[:, same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_column", [False, True])
def test_gptq_with_it_equals_gptq(monkeypatch: pytest.MonkeyPatch, per_column: bool) -> None:
    """The whole sweep, with a metric's own factor."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 150, generator=random), torch.randn(45, 150, generator=random)
    bits = torch.randint(1, 9, (150 if per_column else 45,), generator=random, dtype=torch.uint8)
    grid = minmax_grid(weight.T if per_column else weight, bits)
    expected = gptq.gptq(weight, Hessian(x.T @ x), grid, per_column=per_column)
    monkeypatch.setattr(gptq, "_leaves", lambda device: (gpu_leaf.SPAN, gpu_leaf.leaf))
    grid = Grid(*(part.to(DEVICE) for part in (grid.scale, grid.zero, grid.bits)))
    found = gptq.gptq(weight.to(DEVICE), Hessian((x.T @ x).to(DEVICE)), grid, per_column=per_column).cpu()
    assert (found != expected).any(dim=1).sum() <= 1
