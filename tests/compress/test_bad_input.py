"""Input that cannot be compressed: one error that names the file, what was found and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.compress.pairs import VOCABULARY, Pair, build, tiny_config, write_tokenizer
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, SINGLE
from vllm_prinmix.format.delta import read_config

UP = "model.layers.1.mlp.up_proj.weight"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def another_model(folder: Path, architecture: str = "qwen2", **settings: Any) -> None:
    build(tiny_config(architecture, **settings), seed=2).save_pretrained(folder)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 4] = torch.nan


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][-1] = -torch.inf


def short(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP][:-1].clone()


def small(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)


BAD: dict[str, tuple[Callable[[Pair], Any], str, str]] = {
    "base of another shape": (
        lambda p: another_model(p.base, hidden_size=256),
        "tuned",
        r"another shape.*found: hidden_size = 128; expected: 256",
    ),
    "base of another depth": (
        lambda p: another_model(p.base, num_hidden_layers=3),
        "tuned",
        "num_hidden_layers = 2",
    ),
    "base of another architecture": (
        lambda p: another_model(p.base, "llama"),
        "tuned",
        r"model_type = qwen2; expected: llama",
    ),
    "added vocabulary": (
        lambda p: another_model(p.finetuned, vocab_size=VOCABULARY + 3),
        "tuned",
        f"added vocabulary.*found: vocab_size {VOCABULARY + 3}; expected: {VOCABULARY}",
    ),
    "less vocabulary": (
        lambda p: another_model(p.finetuned, vocab_size=VOCABULARY - 3),
        "tuned",
        f"vocab_size = {VOCABULARY - 3}",
    ),
    "tied against untied": (
        lambda p: another_model(p.finetuned, tie_word_embeddings=True),
        "tuned",
        r"compute differently.*tie_word_embeddings = True",
    ),
    "another rope": (
        lambda p: another_model(p.finetuned, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "tuned",
        r"compute differently.*rope_theta.*500000",
    ),
    "missing tensor": (
        lambda p: edit_tensors(p.finetuned, lambda t: t.pop(UP)),
        "tuned",
        f"1 tensor.* missing.*no {UP}",
    ),
    "missing tensor of the base": (
        lambda p: edit_tensors(p.base, lambda t: t.pop(UP)),
        "base",
        f"1 tensor.* missing.*no {UP}",
    ),
    "extra tensors": (
        lambda p: edit_tensors(
            p.finetuned, lambda t: t.update({"v_head.a": torch.ones(1), "v_head.b": torch.ones(1)})
        ),
        "tuned",
        r"2 tensor\(s\) belong to no module.*v_head.a, v_head.b",
    ),
    "biases that the base lacks": (
        lambda p: edit_tensors(
            p.finetuned, lambda t: t.update({UP.replace("weight", "bias"): torch.ones(192)})
        ),
        "tuned",
        "belong to no module.*up_proj.bias",
    ),
    "misshapen tensor": (
        lambda p: edit_tensors(p.finetuned, short),
        "tuned",
        rf"{UP} has another shape.*\(191, 128\); expected: \(192, 128\)",
    ),
    "quantized tensor": (lambda p: edit_tensors(p.finetuned, small), "tuned", f"{UP} has a dtype.*F8_E4M3"),
    "quantized checkpoint": (
        lambda p: edit_config(p.base, quantization_config={"quant_method": "gptq"}),
        "base",
        r"is quantized.*found: gptq",
    ),
    "NaN": (lambda p: edit_tensors(p.finetuned, nan), "tuned", f"{UP} holds NaN or infinite.*1 of 24576"),
    "infinity in the base": (
        lambda p: edit_tensors(p.base, infinite),
        "base",
        r"model.norm.weight holds NaN or infinite",
    ),
    "unsupported architecture": (
        lambda p: edit_config(p.finetuned, architectures=["MixtralForCausalLM"], model_type="mixtral"),
        "tuned",
        r"unsupported architecture.*Mixtral.*Qwen2ForCausalLM, Qwen3ForCausalLM, Llama.*Mistral",
    ),
    "no architecture": (
        lambda p: edit_config(p.finetuned, architectures=None),
        "tuned",
        r"unsupported architecture.*found: none, model_type qwen2",
    ),
    "pickled": (
        lambda p: (p.finetuned / SINGLE).rename(p.finetuned / "pytorch_model.bin"),
        "tuned",
        "pickled",
    ),
    "truncated": (
        lambda p: (p.base / SINGLE).write_bytes((p.base / SINGLE).read_bytes()[:-9]),
        "base",
        "truncated",
    ),
    "no tokenizer": (
        lambda p: [f.unlink() for folder in (p.base, p.finetuned) for f in folder.glob("tokenizer*")],
        "tuned",
        "no tokenizer is found",
    ),
    "empty calibration": (lambda p: p.calibration.write_text("\n"), "calibration.txt", "data is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_left(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, case: str
) -> None:
    spoil, where, message = BAD[case]
    pair = make_pair()
    spoil(pair)
    with pytest.raises(PrinMixError, match=message) as caught:
        compress(pair, tmp_path / "delta")
    assert f"[{tmp_path / where}" in str(caught.value)
    assert not list(tmp_path.glob("delta*"))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no calibration": ({"calibration": None}, r"required.*\[--calibration\].*--calibration FILE"),
    "ratio 0": ({"ratio": Fraction(0)}, r"\[--ratio\]; found: 0"),
    "ratio above 1": ({"embedding_ratio": Fraction(16)}, r"\[--embedding-ratio\]; found: 16"),
    "no width": ({"bits": (0,)}, r"\[--bits\]; found: 0"),
    "width 9": ({"bits": (0, 9)}, r"\[--bits\]; found: 0,9"),
    "width twice": ({"bits": (0, 2, 2)}, r"\[--bits\]; found: 0,2,2"),
    "no samples": ({"samples": 0}, r"\[--samples\]; found: 0"),
    "no active widths": ({"max_active_bits": 0}, r"\[--max-active-bits\]; found: 0"),
    "unknown device": ({"device": "abacus"}, r"device cannot be used.*abacus"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, case: str
) -> None:
    changes, message = OPTIONS[case]
    with pytest.raises(PrinMixError, match=message):
        compress(make_pair(), tmp_path / "delta", **changes)


@pytest.mark.parametrize(
    ("option", "module"),
    [("ratio", "model.layers.0.self_attn.k_proj.weight"), ("embedding_ratio", EMBEDDING)],
)
def test_ratio_that_cannot_be_reached_names_the_one_that_can(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, option: str, module: str
) -> None:
    pair = make_pair()
    with pytest.raises(PrinMixError, match="cannot be reached") as caught:
        compress(pair, tmp_path / "delta", **{option: Fraction(1, 1000)})
    assert f"--{option.replace('_', '-')}, {module}" in str(caught.value)
    expected = str(caught.value.expected).split(",")[0].removeprefix("at least ")
    smallest = Fraction(expected)
    compress(pair, tmp_path / "delta", **{option: smallest})
    assert module in read_config(tmp_path / "delta").modules
    with pytest.raises(PrinMixError, match="cannot be reached"):
        compress(pair, tmp_path / "other", **{option: smallest * Fraction(9, 10)})


@pytest.mark.parametrize("same", [True, False], ids=["a copy", "another"])
def test_tied_checkpoints_may_hold_a_copy_under_lm_head(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, same: bool
) -> None:
    pair = make_pair("qwen3", tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING] + (0 if same else 1)

    edit_tensors(pair.finetuned, add)
    if same:
        compress(pair, tmp_path / "delta")
        assert "lm_head.weight" not in read_config(tmp_path / "delta").modules
    else:
        with pytest.raises(PrinMixError, match=r"belong to no module.*lm_head.weight"):
            compress(pair, tmp_path / "delta")


def test_old_rotary_tables_pass(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair("llama")
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(pair.base, lambda tensors: tensors.update({table: torch.ones(32)}))
    compress(pair, tmp_path / "delta")
    config = read_config(tmp_path / "delta")
    assert table not in {*config.modules, *config.unchanged}


def test_tokenizer_of_the_base_serves_where_the_fine_tune_has_none(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    compress(pair, tmp_path / "one")
    for file in pair.finetuned.glob("tokenizer*"):
        file.unlink()
    write_tokenizer(pair.base)
    compress(pair, tmp_path / "two")
    one, two = (read_config(tmp_path / name).calibration for name in ("one", "two"))
    assert one == two
