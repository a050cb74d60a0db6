"""`prinmix compress` as a whole on tiny pairs: what is stored, in how many bytes, and that it is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from tests.compress.pairs import Pair, finetune
from tests.compress.test_resume import contents, interrupt
from vllm_prinmix.compress import metrics, run
from vllm_prinmix.compress.calibration import NONE
from vllm_prinmix.compress.inspection import describe
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.metrics import hessians
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, SINGLE, Checkpoint
from vllm_prinmix.format.delta import read_config, read_delta
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import CONFIG_FILE, WEIGHTS_FILE, Factors

CASES: dict[str, dict[str, Any]] = {
    "qwen2 bf16": {"architecture": "qwen2"},
    "qwen3 fp16 tied": {"architecture": "qwen3", "dtype": torch.float16, "tie_word_embeddings": True},
    "llama fp32 sharded": {"architecture": "llama", "dtype": torch.float32, "shard_size": "300KB"},
    "mistral bf16 tuned in fp32": {
        "architecture": "mistral",
        "finetuned_dtype": torch.float32,
        "sliding_window": 8,
    },
    "llama with biases": {"architecture": "llama", "attention_bias": True, "mlp_bias": True},
}


def is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight") or name in (EMBEDDING, HEAD)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_stored_and_errors_are_as_recorded(
    make_pair: Callable[..., Pair], compress: Callable[..., str], console: Console, tmp_path: Path, case: str
) -> None:
    pair = make_pair(**CASES[case])
    compress(pair, tmp_path / "delta")
    config, base = read_config(tmp_path / "delta"), Checkpoint(pair.base)
    assert set(config.modules) == set(base.tensors)
    assert {n: spec.kind for n, spec in config.modules.items()} == {
        n: "factors" if is_matrix(n) else "exact" for n in base.tensors
    }
    assert config.base.parameters == sum(stored.numel for stored in base.tensors.values())
    assert (config.base.name, config.finetuned) == ("base", "tuned")
    # Calibration is run again and every error is measured again: they must agree with what was recorded.
    entries = verify(tmp_path / "delta", str(pair.base), str(pair.finetuned), str(pair.calibration), console)
    assert len(entries) == len(base.tensors)
    errors = {entry["name"]: entry["error"] for entry in entries if is_matrix(entry["name"])}
    assert max(errors.values()) < 0.1
    assert not (tmp_path / "delta.partial").exists()


@pytest.mark.parametrize("ratio", ["1/16", "1/40", "0.1"])
def test_ratios_are_hard_limits_on_real_bytes(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, ratio: str
) -> None:
    pair = make_pair()
    compress(pair, tmp_path / "delta", ratio=Fraction(ratio), embedding_ratio=Fraction(1, 7))
    config = read_config(tmp_path / "delta")
    stored = linear = dense = 0
    with safe_open(tmp_path / "delta" / WEIGHTS_FILE, framework="pt") as file:
        for name, spec in config.modules.items():
            if not isinstance(spec, Factors):
                continue
            size = file.get_tensor(name).nbytes
            limit = Fraction(1, 7) if name in (EMBEDDING, HEAD) else Fraction(ratio)
            budget = floor(limit * 2 * spec.shape[0] * spec.shape[1])
            assert budget * 0.75 < size <= budget, name
            stored += size
            if name not in (EMBEDDING, HEAD):
                linear += size
                dense += 2 * spec.shape[0] * spec.shape[1]
    described = describe(tmp_path / "delta")["ratio"]
    assert described["linear"] == {"bytes": linear, "dense_bytes": dense, "ratio": linear / dense}
    assert described["embedding"]["bytes"] == stored - linear
    file_size = (tmp_path / "delta" / WEIGHTS_FILE).stat().st_size
    assert described["whole"]["ratio"] == file_size / (2 * config.base.parameters)


def test_exact_tensors_are_the_fine_tunes_bits(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair("qwen3")
    compress(pair, tmp_path / "delta")
    delta, finetuned = read_delta(tmp_path / "delta"), Checkpoint(pair.finetuned)
    exact = [name for name, spec in delta.config.modules.items() if spec.kind == "exact"]
    assert {"model.norm.weight", "model.layers.1.self_attn.k_norm.weight"} <= set(exact)
    for name in exact:
        assert delta.tensors[name].dtype == torch.bfloat16
        assert torch.equal(delta.tensors[name], finetuned.load(name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["same dtype", "tuned in fp32"])
def test_what_equals_the_base_is_not_stored(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, dtype: torch.dtype
) -> None:
    changed = {"model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"}

    def change(model: Any) -> None:
        before = {name: p.clone() for name, p in model.named_parameters()}
        finetune(model, seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in changed:
                    parameter.copy_(before[name])

    pair = make_pair(change=change, finetuned_dtype=dtype)
    compress(pair, tmp_path / "delta")
    config = read_config(tmp_path / "delta")
    assert set(config.modules) == changed
    assert set(config.unchanged) == set(Checkpoint(pair.base).tensors) - changed


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_unseen_tokens_are_stored(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, tied: bool
) -> None:
    pair = make_pair("qwen2", tie_word_embeddings=tied)
    pair.calibration.write_text("abc\ncab\n")
    compress(pair, tmp_path / "delta")
    delta = read_delta(tmp_path / "delta")
    assert (HEAD in delta.config.modules) != tied
    for name in {EMBEDDING, HEAD} & set(delta.config.modules):
        dw = Checkpoint(pair.finetuned).load(name, torch.float32) - Checkpoint(pair.base).load(name)
        spec = delta.config.modules[name]
        assert isinstance(spec, Factors)
        decoded = decode(spec, delta.tensors[name]).dense()
        error = (dw - decoded).norm(dim=1) / dw.norm(dim=1)
        assert error[104:].max() < 0.5, name  # the tokenizer itself has 103 tokens; 4 of them are in the text


def test_same_seed_same_bytes(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair("qwen3", tie_word_embeddings=True)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        compress(pair, tmp_path / name, seed=seed, samples=4)
    files = {name: contents(tmp_path / name) for name in ("one", "two", "three")}
    assert files["one"] == files["two"]
    assert files["one"][WEIGHTS_FILE] != files["three"][WEIGHTS_FILE]


def test_sharding_of_the_inputs_does_not_matter(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    compress(make_pair(), tmp_path / "one")
    sharded = make_pair(shard_size="100KB")
    (sharded.base / SINGLE).unlink()
    (sharded.finetuned / SINGLE).unlink()
    compress(sharded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_fewer_texts_than_samples_is_said(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    printed = compress(make_pair(), tmp_path / "delta", samples=100)
    assert "calibration.txt has 8 samples, --samples is 100: all are used" in printed
    calibration = read_config(tmp_path / "delta").calibration
    assert calibration is not None
    assert (calibration.samples, calibration.source) == (8, "calibration.txt")


def test_tenants_own_files_are_copied(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    compress(pair, tmp_path / "same")
    assert sorted(contents(tmp_path / "same")) == ["delta.safetensors", "prinmix_config.json"]
    (pair.finetuned / "chat_template.jinja").write_text("{{ messages }}")
    settings = json.loads((pair.finetuned / "tokenizer_config.json").read_text())
    (pair.finetuned / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 7}))
    compress(pair, tmp_path / "own")
    own = contents(tmp_path / "own")
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert own[name] == (pair.finetuned / name).read_bytes()
    assert "generation_config.json" not in own


def test_delta_files_can_be_read_by_others(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    compress(make_pair(), tmp_path / "delta")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert {p.stat().st_mode for p in (tmp_path / "delta").iterdir()} == {plain.stat().st_mode}


def test_output_is_replaced_only_when_asked(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    out = tmp_path / "delta"
    out.mkdir()
    (out / "precious").write_text("x")
    (out / CONFIG_FILE).write_text("an old delta")
    with pytest.raises(PrinMixError, match=r"already there.*--overwrite"):
        compress(pair, out)
    assert (out / "precious").read_text() == "x"
    compress(pair, out, overwrite=True)
    assert not (out / "precious").exists()
    assert read_config(out).modules
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "calibration.txt", "delta", "tuned"]


def test_one_active_width_cannot_store_anything(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(PrinMixError, match=r"not one direction was chosen.*--max-active-bits 2"):
        compress(make_pair(), tmp_path / "delta", max_active_bits=1)


def test_a_shared_budget_keeps_to_the_ratio_and_has_less_error(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    """The linear layers together take what they may; some more than their own share, others less."""
    pair = make_pair()
    errors = {}
    for budget in ("shared", "even", "module"):
        out = tmp_path / budget
        compress(pair, out, method=PrinMix(), budget=budget, ratio=Fraction(1, 8), compensate=False)
        description = describe(out)
        assert description["settings"]["budget"] == budget
        linear = [m for m in description["modules"] if m["name"] not in (EMBEDDING, HEAD)]
        assert 0.115 < description["ratio"]["linear"]["ratio"] <= 1 / 8
        assert any(m["ratio"] > 1 / 8 for m in linear) is (budget != "module")
        errors[budget] = sum(m["report"]["error"] for m in linear)
    # What counts more than the sum of errors is their effect: `tests/compress/test_sensitivity.py`.
    assert errors["even"] < errors["shared"]
    assert errors["even"] < errors["module"]


def test_without_data_a_budget_is_shared_evenly(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    compress(make_pair(), tmp_path / "delta", method=PrinMix(), ratio=Fraction(1, 8), calibration=NONE)
    assert describe(tmp_path / "delta")["settings"]["budget"] == "even"


def test_an_interrupted_run_keeps_the_shares(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes are those of a run in one go, and nothing is surveyed twice."""
    pair = make_pair()
    options = {"method": PrinMix(), "ratio": Fraction(1, 8)}
    compress(pair, tmp_path / "whole", **options)
    interrupt(monkeypatch, after=12)
    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "parts", **options)
    monkeypatch.setattr(PrinMix, "curve", None)  # not called again
    compress(pair, tmp_path / "parts", **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_bytes_are_shared_by_no_more_samples_than_it_takes(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The survey runs the first samples, up to 4 tokens for each input; what follows runs them all."""
    seen = []

    def watched(model: Any, checkpoint: Any, samples: list[torch.Tensor], *rest: Any) -> Any:
        seen.append([len(sample) for sample in samples])
        return hessians(model, checkpoint, samples, *rest)

    monkeypatch.setattr(run, "hessians", watched)
    monkeypatch.setattr(metrics, "TOKENS_PER_INPUT", 0.5)
    method = PrinMix(alternations=0)
    compress(make_pair(), tmp_path / "delta", method=method, ratio=Fraction(1, 8), compensate=False)
    survey, all_samples = seen
    assert survey == all_samples[: len(survey)]
    inputs = max(m["shape"][1] for m in describe(tmp_path / "delta")["modules"] if "layers" in m["name"])
    assert sum(survey[:-1]) < 0.5 * inputs <= sum(survey) < sum(all_samples)


def test_too_few_tokens_are_said(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair, text = make_pair(), "too few to know what each needs"
    few = {"method": PrinMix(alternations=0, clipping=False), "ratio": Fraction(1, 8), "samples": 1}
    assert text in compress(pair, tmp_path / "shared", **few)
    assert text not in compress(pair, tmp_path / "module", budget="module", **few)
    assert text not in compress(pair, tmp_path / "more", **(few | {"samples": 8}))


@pytest.mark.parametrize("text", ["a", "a\n" * 20], ids=["one token", "the same again"])
def test_calibration_may_say_the_same_over_and_over(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, text: str
) -> None:
    pair = make_pair()
    pair.calibration.write_text(text)
    compress(pair, tmp_path / "delta")
    assert all(0 <= m["report"]["error"] < 0.1 for m in describe(tmp_path / "delta")["modules"])
