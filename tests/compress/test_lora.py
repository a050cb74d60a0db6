"""LoRA adapters as input: merged as PEFT does, compressed at their rank, refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.compress.adapters import ALL, PREFIX, WEIGHTS, edit_adapter, write_adapter
from tests.compress.pairs import VOCABULARY, Pair
from vllm_prinmix.compress.lora import MergedLora
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint
from vllm_prinmix.format.delta import read_config
from vllm_prinmix.format.schema import Exact, Factors

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def expected_change(adapter: Path, module: str, scaling: float) -> torch.Tensor:
    """scaling * B A in float64, straight from the file."""
    tensors = load_file(adapter / WEIGHTS)
    a, b = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    return scaling * (b @ a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_tensors(make_pair: Callable[..., Pair], tmp_path: Path, dtype: torch.dtype) -> None:
    pair = make_pair()
    adapter = write_adapter(
        tmp_path / "lora", pair.base, rank=4, ranks={"1.mlp.down_proj": 6}, dtype=dtype,
        alpha_pattern={"model.layers.0.self_attn.q_proj": 3, "k_proj": 5}, lora_alpha=12,
    )  # fmt: skip
    base = Checkpoint(pair.base)
    merged = MergedLora(base, adapter)
    assert list(merged.tensors) == list(base.tensors)
    for module, scaling in ((Q, 3 / 4), (DOWN, 12 / 6), (Q.replace("q_proj", "k_proj"), 5 / 4)):
        name = f"{module}.weight"
        change = expected_change(adapter, module, scaling)
        torch.testing.assert_close(merged.difference(base, name).double(), change, rtol=1e-5, atol=1e-8)
        weight = base.load(name).double() + change
        torch.testing.assert_close(merged.load(name).double(), weight, rtol=1e-6, atol=1e-7)
        assert merged.tensors[name].dtype == "F32"
        assert merged.load(name, torch.bfloat16).dtype == torch.bfloat16
        data = b"".join(merged.chunks(name, 1000))
        assert data == merged.read(name) == merged.load(name).numpy().tobytes()
        assert merged.read(name, 100, 50) == data[100:150]
        assert len(data) == merged.tensors[name].nbytes
    for name in ("model.norm.weight", EMBEDDING, f"{Q.replace('weight', 'bias')}.bias"):
        assert merged.tensors[name] == base.tensors[name]
        assert torch.equal(merged.load(name), base.load(name))


def test_rank_stabilized_scaling(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair()
    adapter = write_adapter(tmp_path / "lora", pair.base, rank=4, lora_alpha=3, use_rslora=True)
    base = Checkpoint(pair.base)
    change = MergedLora(base, adapter).difference(base, f"{DOWN}.weight").double()
    expected = expected_change(adapter, DOWN, 3 / math.sqrt(4))
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-8)


def test_whole_tensors_biases_and_embeddings(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair()  # qwen2: q, k and v have biases
    base = Checkpoint(pair.base)
    random = torch.Generator().manual_seed(1)
    bias = {
        n.replace("_proj.", "_proj.base_layer."): torch.randn(s.shape, generator=random)
        for n, s in base.tensors.items()
        if n.endswith(".bias")
    }
    whole = {
        "model.norm.weight": torch.randn(128, generator=random),
        "model.embed_tokens.base_layer.weight": torch.randn(VOCABULARY, 128, generator=random),
    }
    adapter = write_adapter(
        tmp_path / "lora", pair.base, targets=[*ALL, "embed_tokens", "lm_head"], extra=bias | whole,
        bias="lora_only", modules_to_save=["norm"],
    )  # fmt: skip
    merged = MergedLora(base, adapter)
    tensors = load_file(adapter / WEIGHTS)
    for name, tensor in bias.items():
        assert torch.equal(merged.load(name.replace("base_layer.", "")), tensor)
    assert torch.equal(merged.load("model.norm.weight"), whole["model.norm.weight"])
    a, b = (tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    embedding = whole["model.embed_tokens.base_layer.weight"] + 2 * (b @ a).T
    torch.testing.assert_close(merged.load(EMBEDDING), embedding)
    torch.testing.assert_close(merged.difference(base, EMBEDDING), embedding - base.load(EMBEDDING).float())
    assert merged.tensors[HEAD].dtype == "F32"


@pytest.mark.parametrize("method", ["prinmix", "prinmix-paper"])
def test_a_delta_has_the_adapters_rank(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    console: Console,
    tmp_path: Path,
    method: str,
) -> None:
    pair = make_pair()
    pair = dataclasses.replace(pair, finetuned=write_adapter(tmp_path / "lora", pair.base, rank=16))
    settings: dict[str, Any] = {"lora": True}
    if method == "prinmix":
        settings["method"] = PrinMix()
    printed = compress(pair, tmp_path / "delta", ratio=Fraction(1, 2), **settings)
    assert "by its config of some/base" in printed
    config = read_config(tmp_path / "delta")
    assert config.finetuned == "lora"
    assert len(config.modules) == 14  # what the adapter leaves alone is not stored
    for name, spec in config.modules.items():
        assert isinstance(spec, Factors), name
        assert 0 < sum(c.directions for c in spec.classes) <= 16
        assert float(spec.report["error"] or 0) < 1e-3
    entries = verify(
        tmp_path / "delta", str(pair.base), str(pair.finetuned), str(pair.calibration), console, lora=True
    )
    assert {entry["name"] for entry in entries} == set(config.modules)


def test_small_ratios_and_side_files(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    adapter = write_adapter(
        tmp_path / "lora", pair.base, targets=["down_proj"], extra={"model.norm.weight": torch.ones(128)}
    )
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    pair = dataclasses.replace(pair, finetuned=adapter)
    compress(pair, tmp_path / "delta", ratio=Fraction(1, 64), lora=True)
    config = read_config(tmp_path / "delta")
    assert isinstance(config.modules["model.norm.weight"], Exact)
    assert len(config.modules) == 3
    assert (tmp_path / "delta" / "chat_template.jinja").is_file()


def test_tied_embeddings_saved_twice(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair("qwen3", tie_word_embeddings=True)
    table = torch.randn(VOCABULARY, 128)
    both = {EMBEDDING: table, HEAD: table.clone()}
    adapter = write_adapter(tmp_path / "lora", pair.base, extra=both)
    assert torch.equal(MergedLora(Checkpoint(pair.base), adapter).load(EMBEDDING), table)
    edit_adapter(adapter, **{HEAD: table + 1})
    with pytest.raises(PrinMixError, match=r"unties.*found: lm_head.weight, model.embed_tokens.weight"):
        MergedLora(Checkpoint(pair.base), adapter)


def test_an_untrained_adapter_changes_nothing(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    adapter = write_adapter(tmp_path / "lora", pair.base)
    tensors = {k: t * ("lora_A" in k) for k, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(PrinMixError, match="nothing to compress"):
        compress(dataclasses.replace(pair, finetuned=adapter), tmp_path / "delta", lora=True)


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def set_config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def set_tensors(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: edit_adapter(folder, **tensors)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no adapter": (lambda f: (f / "adapter_config.json").unlink(), "not a PEFT adapter"),
    "no weights": (no_weights, "the adapter has no weights"),
    "pickled": (pickled, "pickled"),
    "config damaged": (lambda f: (f / "adapter_config.json").write_text("{"), "not a JSON object"),
    "config without rank": (set_config(r=None), "config cannot be used"),
    "bad pattern": (set_config(rank_pattern={"(": 3}), "config cannot be used"),
    "bad bias": (set_config(bias="some"), r"config cannot be used.*bias some"),
    "prompt tuning": (set_config(peft_type="PROMPT_TUNING"), r"not supported.*peft_type PROMPT_TUNING"),
    "DoRA": (set_config(use_dora=True), r"not supported.*use_dora"),
    "fan in, fan out": (set_config(fan_in_fan_out=True), r"not supported.*fan_in_fan_out"),
    "a setting of the future": (set_config(twisted=2), r"not supported.*twisted = 2"),
    "PiSSA": (set_config(init_lora_weights="pissa_niter_16"), r"changed base.*pissa_niter_16"),
    "no such module": (
        set_tensors(model__layers__9__mlp__down_proj__lora_A__weight=torch.ones(4, 192)),
        r"fit no module of the base.*layers.9",
    ),
    "no such tensor": (set_tensors(v_head__weight=torch.ones(3)), r"fit no module.*v_head.weight"),
    "DoRA's vectors": (
        set_tensors(model__layers__0__mlp__down_proj__lora_magnitude_vector=torch.ones(128)),
        r"1 tensor\(s\) are of a kind.*lora_magnitude_vector",
    ),
    "half a pair": (set_tensors(**{f"{Q}.lora_B.weight": None}), r"has not the two.*q_proj.lora_A.weight"),
    "another rank": (
        set_tensors(**{f"{Q}.lora_A.weight": torch.ones(5, 128)}),
        r"lora_A.weight does not fit.*\(5, 128\); expected: \(4, 128\)",
    ),
    "another width": (
        set_tensors(**{f"{Q}.lora_A.weight": torch.ones(4, 64)}),
        r"does not fit.*\(4, 64\); expected: \(4, 128\)",
    ),
    "integers": (
        set_tensors(**{f"{Q}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}),
        "dtype.*I8.*BF16",
    ),
    "a target without factors": (
        set_tensors(**{f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}),
        rf"no factors of modules that it targets.*{Q}",
    ),
    "factors without a target": (set_config(target_modules=["q_proj"]), "does not target.*down_proj"),
    "layers that are not its": (set_config(layers_to_transform=[1]), r"does not target.*layers\.0"),
    "excluded": (set_config(exclude_modules=r".*\.1\..*"), r"does not target.*layers\.1"),
    "a module to save is missing": (set_config(modules_to_save=["lm_head"]), "no tensor of lm_head"),
    "missing biases": (set_config(bias="all"), r"biases are missing.*q_proj.bias"),
    "added vocabulary": (
        set_tensors(**{EMBEDDING: torch.ones(VOCABULARY + 1, 128)}),
        r"another shape.*\(161, 128\).*added vocabulary",
    ),
    "stored twice": (
        set_tensors(**{f"{Q}.bias": torch.ones(128), f"{Q}.base_layer.bias": torch.ones(128)}),
        r"q_proj.bias is stored twice",
    ),
    "NaN": (
        set_tensors(**{f"{Q}.lora_A.weight": torch.full((4, 128), torch.nan)}),
        rf"{Q}.weight holds NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, case: str
) -> None:
    spoil, message = BAD[case]
    pair = make_pair()
    adapter = write_adapter(tmp_path / "lora", pair.base)
    spoil(adapter)
    with pytest.raises(PrinMixError, match=message) as caught:
        compress(dataclasses.replace(pair, finetuned=adapter), tmp_path / "delta", lora=True)
    assert str(adapter) in str(caught.value)
    assert not list(tmp_path.glob("delta*"))


def test_tied_embeddings_changed_once(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair("qwen3", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "lora", pair.base, targets=["q_proj", "embed_tokens"])
    with pytest.raises(PrinMixError, match="unties"):
        MergedLora(Checkpoint(pair.base), adapter)


def test_a_checkpoint_is_no_adapter_and_the_other_way_round(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    with pytest.raises(PrinMixError, match=r"not a PEFT adapter.*--finetuned"):
        compress(pair, tmp_path / "delta", lora=True)
    adapter = write_adapter(tmp_path / "lora", pair.base)
    with pytest.raises(PrinMixError, match=r"an adapter, not a full checkpoint.*--from-lora"):
        compress(dataclasses.replace(pair, finetuned=adapter), tmp_path / "delta")
