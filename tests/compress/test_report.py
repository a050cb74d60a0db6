"""The report: its numbers are those of the delta's bytes, and its page needs nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.compress.pairs import Pair
from tests.format.deltas import write_small_delta
from tests.kernels.deltas import random_factors
from vllm_prinmix.compress.report import collect, kendall_tau, show, singular_values, spread
from vllm_prinmix.compress.report_charts import Axis
from vllm_prinmix.compress.report_page import page
from vllm_prinmix.compress.report_terms import terms
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.delta import read_delta, write_delta
from vllm_prinmix.format.payload import decode, encode, encode_matrix
from vllm_prinmix.format.schema import (
    WEIGHTS_FILE,
    Base,
    DeltaConfig,
    Exact,
    Factors,
    Module,
    Settings,
    Weights,
)
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "srcset", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> dict[str, Any]:
    """The JSON in a page that is well formed and self-contained."""
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not {"link", "img", "iframe", "object"} & set(tags.seen)
    assert not re.search(r"https?:|url\(|@import|nan|Infinity", text)
    return json.loads(text.partition('id="report">')[2].partition("</script>")[0])


def mixed_delta(folder: Path) -> None:
    """Factors, none at all, a whole matrix, an embedding, an exact tensor and an unchanged one."""
    folder.mkdir()
    random = torch.Generator().manual_seed(3)
    matrix = QuantizedMatrix(
        torch.randint(0, 2, (32, 64), generator=random, dtype=torch.uint8),
        1,
        torch.rand(32, generator=random),
        torch.full((32,), 0.5, dtype=torch.float16),
    )
    parts = {
        "model.layers.0.self_attn.q_proj.weight": encode(
            random_factors(48, 64, 9, (2, 3), seed=0), {"error": 0.01, "weight_error": 0.2}
        ),
        "model.layers.1.self_attn.q_proj.weight": encode(
            random_factors(48, 64, 5, (4,), seed=1), {"error": 0.02}
        ),
        "model.layers.1.mlp.up_proj.weight": encode_matrix(matrix),
        "model.layers.0.mlp.up_proj.weight": encode(QuantizedFactors.empty(32, 64), {"error": 0.0}),
        "model.embed_tokens.weight": encode(random_factors(100, 64, 7, (8,), seed=2), {"error": 1e-4}),
    }
    modules: dict[str, Module] = {name: spec for name, (spec, _) in parts.items()}
    tensors = {name: payload for name, (_, payload) in parts.items()}
    modules["model.norm.weight"] = Exact(shape=[64], dtype="float32")
    tensors["model.norm.weight"] = torch.ones(64)
    config = DeltaConfig(
        tool="test",
        base=Base(name="<base>", content_digest="x", sample_digest="x", parameters=50_000),
        finetuned="a </script> b",
        settings=Settings(method="mixed", options={}, ratio=None, embedding_ratio=0.25),
        calibration=None,
        modules=modules,
        unchanged=["lm_head.weight"],
        weights=Weights(bytes=8, xxh3_128=""),
    )
    write_delta(folder, config, tensors)


def test_every_number_is_the_deltas(tmp_path: Path, console: Console) -> None:
    mixed_delta(tmp_path / "delta")
    report = check_page(page(collect(tmp_path / "delta", console)))
    delta = read_delta(tmp_path / "delta")
    sizes = {part["part"]: part["bytes"] for part in report["parts"]}
    assert sum(sizes.values()) == (tmp_path / "delta" / WEIGHTS_FILE).stat().st_size
    assert sizes["exact tensors"] == 256
    assert sizes["embedding and lm_head"] == delta.tensors["model.embed_tokens.weight"].nbytes
    assert sizes["codes of whole matrices"] == 32 * 16  # one bit, a block of 128
    q_classes = [
        c
        for name, spec in delta.config.modules.items()
        if isinstance(spec, Factors) and "q_proj" in name
        for c in spec.classes
    ]
    assert sizes["V codes"] == sum(16 * c.v_bits * c.directions for c in q_classes)  # one block of 128 each
    assert sizes["U codes"] == sum(16 * c.u_bits * c.directions for c in q_classes)
    modules = {m["name"]: m for m in report["modules"]}
    assert set(modules) == {n for n, spec in delta.config.modules.items() if spec.kind != "exact"}
    assert report["types"] == ["q_proj", "up_proj"]
    for name, module in modules.items():
        spec = delta.config.modules[name]
        assert not isinstance(spec, Exact)
        assert module["bytes"] == delta.tensors[name].nbytes
        assert module["error"] == spec.report.get("error")
        assert module["weight_error"] == spec.report.get("weight_error")
        decoded = decode(spec, delta.tensors[name])
        if isinstance(decoded, QuantizedMatrix):
            assert (module["bits"], module["directions"]) == (1.0, None)
            continue
        assert module["directions"] == decoded.directions
        outer = [
            torch.linalg.matrix_norm(float(s) * torch.outer(u, v))
            for s, u, v in zip(decoded.scale, decoded.u(), decoded.v(), strict=True)
        ]
        found = [value for _, value in module["singular_values"]]
        assert found == pytest.approx(sorted(map(float, outer), reverse=True), rel=1e-5)
        bits = decoded.v_bits.sum() * decoded.shape[1] + decoded.u_bits.sum() * decoded.shape[0]
        assert module["bits"] == pytest.approx(float(bits) / max(1, sum(decoded.shape) * decoded.directions))
    assert modules["model.layers.1.self_attn.q_proj.weight"]["layer"] == 1
    assert modules["model.embed_tokens.weight"]["layer"] is None


def test_one_module_and_no_errors(tmp_path: Path, console: Console) -> None:
    write_small_delta(tmp_path / "delta")
    collected = collect(tmp_path / "delta", console)
    text = page(collected)
    report = check_page(text)
    assert report == json.loads(json.dumps(collected))
    assert len(report["modules"]) == 1
    assert "<h2>Errors</h2>" not in text
    assert "Scaling and difference" not in text
    show(collected, console)
    assert "q_proj" in console.file.getvalue()  # type: ignore[attr-defined]


def test_nothing_but_exact_tensors(tmp_path: Path, console: Console) -> None:
    config = write_small_delta(tmp_path / "small")
    (tmp_path / "delta").mkdir()
    name = "model.norm.weight"
    config = config.model_copy(update={"modules": {name: config.modules[name]}})
    write_delta(tmp_path / "delta", config, {name: torch.ones(64, dtype=torch.bfloat16)})
    collected = collect(tmp_path / "delta", console)
    assert check_page(page(collected))["modules"] == []
    show(collected, console)


def test_row_scales_count(tmp_path: Path) -> None:
    factors = random_factors(24, 40, 6, (3,), seed=0)
    factors.row_scale = torch.rand(24).half()
    for i, value in enumerate(singular_values(factors)):
        one = factors.scale[i] * torch.outer(factors.row_scale.float() * factors.u()[i], factors.v()[i])
        torch.testing.assert_close(value, torch.linalg.matrix_norm(one))


def test_kendall_tau_against_all_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    widths = torch.randint(1, 5, (60,), generator=random)
    values = (widths + 3 * torch.rand(60, generator=random)).round(decimals=1)  # with ties
    signs = [
        int(torch.sign(widths[i] - widths[j]) * torch.sign(values[i] - values[j]))
        for i, j in combinations(range(60), 2)
        if widths[i] != widths[j]
    ]
    assert kendall_tau(widths, values) == pytest.approx(sum(signs) / len(signs))
    assert kendall_tau(torch.tensor([2, 2, 4, 8]), torch.tensor([1.0, 2.0, 3.0, 4.0])) == 1
    assert kendall_tau(torch.tensor([2, 2]), torch.tensor([1.0, 2.0])) is None
    assert kendall_tau(torch.tensor([]), torch.tensor([])) is None


@pytest.mark.parametrize("count", [0, 1, 48, 49, 1000, 4096])
def test_curves_keep_both_ends(count: int) -> None:
    chosen = spread(count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= 48
    assert not count or (chosen[0], chosen[-1]) == (0, count - 1)


@pytest.mark.parametrize("log", [False, True], ids=["linear", "logarithmic"])
@pytest.mark.parametrize(
    "values", [[3.0], [0.0, 0.0], [1e-9, 1e4], [0.91, 0.97], [5.0, 5.1], [-1.0, 1.0], []]
)
def test_axes(values: list[float], log: bool) -> None:
    axis = Axis(values, 10, 110, log)
    assert all(10 <= axis(v) <= 110 for v in values if axis.shows(v))
    ticks = axis.ticks()
    assert ticks
    assert len(ticks) <= 12
    assert all(9.9 <= axis(t) <= 110.1 for t in ticks)


def test_terms_of_equation_5(
    make_pair: Callable[..., Pair], compress: Callable[..., str], console: Console, tmp_path: Path
) -> None:
    pair = make_pair()
    compress(pair, tmp_path / "delta")
    source = (str(pair.base), str(pair.finetuned), str(pair.calibration))
    found = terms(tmp_path / "delta", *source, None, console)
    assert found["module"] == "model.layers.1.self_attn.q_proj.weight"
    assert set(found["difference"]) == {"2", "3", "4", "8"}
    scaling = [value for _, value in found["scaling"]]
    assert scaling == sorted(scaling, reverse=True)
    coarse, fine = ([v for _, v in found["difference"][bits]] for bits in ("2", "8"))
    assert sum(fine) < sum(coarse) / 100
    report = collect(tmp_path / "delta", console) | {"terms": found}
    assert check_page(page(report))["terms"] == found
    free = terms(tmp_path / "delta", *source[:2], "none", "layers.0.mlp.up_proj", console)
    assert free["module"] == "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(PrinMixError, match="no such linear layer"):
        terms(tmp_path / "delta", *source, "model.norm", console)
    with pytest.raises(PrinMixError, match="not the base that the delta was made from"):
        terms(tmp_path / "delta", source[1], *source[1:], None, console)
