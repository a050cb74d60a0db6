"""The baselines together: bytes, order of quality, that they are served, and the command from end to end."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.compress.layers import Layer, make_layer, relative_error
from tests.compress.pairs import Pair
from tests.kernels.deltas import pack
from vllm_prinmix.compress.inspection import describe
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.compress.methods.low_rank import low_rank_fp16
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint
from vllm_prinmix.format.delta import read_config
from vllm_prinmix.format.payload import encode
from vllm_prinmix.format.schema import Matrix
from vllm_prinmix.kernels import cpu
from vllm_prinmix.kernels.packing import matrix_bytes

SIZE = 192
# Every baseline with the options that matter, and the ratio it is asked for (None: its own size).
CASES: dict[str, tuple[str, dict[str, Any], Fraction | None]] = {
    "delta-come": ("delta-come", {}, Fraction(1, 16)),
    "bitdelta": ("bitdelta", {}, None),
    "bitdelta fitted": ("bitdelta", {"scale": "fitted"}, None),
    "low-rank": ("low-rank", {}, Fraction(1, 16)),
    "gptq": ("gptq", {}, Fraction(1, 4)),
    "gptq 1 bit": ("gptq", {"bits": (1,)}, None),
    "deltazip": ("deltazip", {}, None),
    "deltazip 4 bits": ("deltazip", {"bits": (4,)}, None),
    "gpt-zip": ("gpt-zip", {}, None),
}


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer(SIZE, SIZE, decay=0.6, outliers=3)


def budget(layer: Layer, ratio: Fraction | None) -> int | None:
    return None if ratio is None else int(ratio * 2 * layer.dw.numel())


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_reported_error(layer: Layer, case: str) -> None:
    name, options, ratio = CASES[case]
    method, limit = registry.make(name, **options), budget(layer, ratio)
    assert method.has_own_size == (limit is None)
    quantized, report = method.compress(layer.dw, Hessian(layer.calibration), limit)
    _, payload = encode(quantized, report)  # the report holds what the format can
    assert payload.numel() >= method.least_bytes(SIZE, SIZE)
    if limit is None:
        assert payload.numel() == method.least_bytes(SIZE, SIZE)
    else:
        assert payload.numel() <= limit
    measured = relative_error(layer.dw, quantized.dense(), layer.calibration)
    assert report["error"] == pytest.approx(measured, rel=1e-3)
    again, _ = method.compress(layer.dw, Hessian(layer.calibration), limit)
    assert torch.equal(encode(again)[1], payload)


@pytest.mark.parametrize("shape", [(70, 300), (300, 70), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_shape_and_what_is_served(case: str, shape: tuple[int, int]) -> None:
    """x dW^T of the packed bytes is that of `dense`, with any method's result."""
    name, options, ratio = CASES[case]
    random = torch.Generator().manual_seed(0)
    dw = torch.randn(shape, generator=random)
    inputs = torch.randn(shape[1], 400, generator=random)
    method = registry.make(name, **options)
    limit = None if ratio is None else max(2 * dw.numel() // 2, method.least_bytes(*shape))
    quantized, _ = method.compress(dw, Hessian(inputs @ inputs.T), limit)
    x = torch.randn(5, shape[1], generator=random)
    expected = x @ quantized.dense().T
    assert expected.any()
    assert torch.allclose(cpu.linear(x, pack(quantized)), expected, atol=1e-4 * float(expected.abs().max()))


def error(layer: Layer, name: str, ratio: int | None, **options: Any) -> float:
    """On inputs that calibration did not contain."""
    method = registry.make(name, **options)
    limit = budget(layer, None if ratio is None else Fraction(1, ratio))
    quantized, _ = method.compress(layer.dw, Hessian(layer.calibration), limit)
    return relative_error(layer.dw, quantized.dense(), layer.heldout)


@pytest.mark.parametrize("ratio", [16, 32])
def test_order_of_quality_in_the_same_bytes(layer: Layer, ratio: int) -> None:
    """Low rank, mixed widths by rank, the paper's widths, ours: each much better than the one before."""
    errors = [
        error(layer, "low-rank", ratio),
        error(layer, "delta-come", ratio),
        error(layer, "prinmix-paper", ratio, solver="exact"),
        error(layer, "prinmix", ratio),
    ]
    assert all(better < 0.9 * worse for worse, better in pairwise(errors)), errors


def test_order_of_quality_without_svd(layer: Layer) -> None:
    """Twice the bytes help; zeros cost."""
    assert error(layer, "gptq", None, bits=(2,)) < error(layer, "deltazip", None)
    assert error(layer, "deltazip", None, bits=(4,)) < 0.5 * error(layer, "deltazip", None)
    assert error(layer, "deltazip", None) < 0.5 * error(layer, "gpt-zip", None) < 0.5
    assert error(layer, "gptq", None, bits=(3,)) < 0.5 * error(layer, "gptq", None, bits=(2,))
    assert error(layer, "prinmix", 16) < error(layer, "bitdelta", None) < 0.5


def test_eight_bits_are_the_stronger_low_rank(layer: Layer) -> None:
    limit = budget(layer, Fraction(1, 16))
    assert limit is not None
    halves = relative_error(layer.dw, low_rank_fp16(layer.dw, limit), layer.heldout)
    assert error(layer, "low-rank", 16) < 0.98 * halves


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case])  # each method once
def test_from_end_to_end(
    make_pair: Callable[..., Pair], compress: Callable[..., str], console: Console, tmp_path: Path, case: str
) -> None:
    name, options, ratio = CASES[case]
    if name != "gptq" and ratio:
        ratio = Fraction(1, 8)  # rows of 128 and 64 entries: a direction is no small part of such matrices
    pair, delta = make_pair(), tmp_path / "delta"
    compress(pair, delta, method=registry.make(name, **options), ratio=ratio)
    config = read_config(delta)
    assert config.settings.method == name
    assert config.settings.ratio == (None if ratio is None else float(ratio))
    kind = "factors" if name in ("delta-come", "low-rank") else "matrix"
    for module, spec in config.modules.items():
        if module.endswith("_proj.weight"):
            assert spec.kind == kind
            if isinstance(spec, Matrix):
                size = matrix_bytes(spec.bits, *spec.shape)
                described = next(m for m in describe(delta)["modules"] if m["name"] == module)
                assert described["bytes"] == size
                assert ("native_bytes" in spec.report) == (name in ("deltazip", "gpt-zip"))
    assert {config.modules[module].kind for module in (EMBEDDING, HEAD)} == {"factors"}
    entries = verify(delta, str(pair.base), str(pair.finetuned), str(pair.calibration), console)
    assert len(entries) == len(Checkpoint(pair.base).tensors)
    merge(str(pair.base), delta, tmp_path / "merged", "float32", False, console)
    merged, base = Checkpoint(tmp_path / "merged"), Checkpoint(pair.base)
    module = "model.layers.0.mlp.down_proj.weight"
    change = merged.load(module) - base.load(module).float()
    wanted = Checkpoint(pair.finetuned).load(module, torch.float32) - base.load(module).float()
    assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.3


def test_the_ratio_that_works_is_named(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    """One bit per weight and 6 bytes per row: never 1/16."""
    pair = make_pair()
    with pytest.raises(PrinMixError, match=r"cannot be reached with the method gptq.*1/16.*--ratio 1/10 or"):
        compress(pair, tmp_path / "delta", method=registry.make("gptq"), ratio=Fraction(1, 16))
    compress(pair, tmp_path / "delta", method=registry.make("gptq"), ratio=Fraction(1, 10))
    fixed = registry.make("bitdelta")
    with pytest.raises(PrinMixError, match=r"method bitdelta.*or leave it out: the method's size is fixed"):
        compress(pair, tmp_path / "other", method=fixed, ratio=Fraction(1, 32))


@pytest.mark.parametrize("method", [registry.make("gptq"), registry.make("delta-come")], ids=str)
def test_a_method_without_a_size_of_its_own_needs_a_ratio(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, method: Method
) -> None:
    with pytest.raises(PrinMixError, match=r"needs a ratio.*--method"):
        compress(make_pair(), tmp_path / "delta", method=method, ratio=None)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_compressed_alike_whatever_the_baseline(case: str) -> None:
    name, options, _ = CASES[case]
    assert registry.make(name, **options).for_embedding() == PrinMix()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gptq", {"bits": (2, 3)}, r"one bit-width.*--bits.*found: 2,3"),
        ("gptq", {"bits": (9,)}, r"one bit-width.*found: 9.*one of 1, 2"),
        ("deltazip", {"bits": (3,)}, r"one bit-width.*found: 3.*one of 2, 4"),
        ("bitdelta", {"scale": "best"}, r"unknown scale.*--scale.*best.*mean or fitted"),
        ("bitdelta", {"bits": (1,)}, r"no such option.*--method bitdelta.*--bits.*--scale"),
        ("low-rank", {"delta_come_quirk": True}, r"no such option.*--delta-come-quirk.*no options"),
    ],
)
def test_options_that_cannot_be_used(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrinMixError, match=message):
        registry.make(name, **options)
