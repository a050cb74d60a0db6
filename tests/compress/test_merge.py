"""`prinmix merge`: base + decoded delta, as a checkpoint that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.compress.pairs import Pair
from vllm_prinmix.compress import merge as module
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import INDEX, SINGLE, Checkpoint
from vllm_prinmix.format.delta import read_delta
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import WEIGHTS_FILE, Exact

PAIRS: dict[str, dict[str, Any]] = {
    "qwen2 bf16": {"architecture": "qwen2"},
    "qwen3 fp16 tied sharded": {
        "architecture": "qwen3",
        "dtype": torch.float16,
        "tie_word_embeddings": True,
        "shard_size": "200KB",
    },
}


@pytest.fixture
def make_delta(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> Callable[..., tuple[Pair, Path]]:
    def make(**settings: Any) -> tuple[Pair, Path]:
        pair = make_pair(**settings)
        compress(pair, tmp_path / "delta")
        return pair, tmp_path / "delta"

    return make


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", PAIRS)
def test_tensors_are_base_plus_delta_in_float32_then_cast(
    make_delta: Callable[..., tuple[Pair, Path]],
    console: Console,
    tmp_path: Path,
    case: str,
    dtype: str | None,
) -> None:
    pair, folder = make_delta(**PAIRS[case])
    merge(str(pair.base), folder, tmp_path / "merged", dtype, False, console)
    base, merged, delta = Checkpoint(pair.base), Checkpoint(tmp_path / "merged"), read_delta(folder)
    assert set(merged.tensors) == set(base.tensors)
    target = PAIRS[case].get("dtype", torch.bfloat16) if dtype is None else getattr(torch, dtype)
    for name in base.tensors:
        expected = base.load(name).float()
        spec = delta.config.modules[name]
        if isinstance(spec, Exact):
            expected = delta.tensors[name].float()
        else:
            expected = expected + decode(spec, delta.tensors[name]).dense()
        found = merged.load(name)
        assert found.dtype == target
        assert torch.equal(found, expected.to(target)), name


@pytest.mark.parametrize("case", PAIRS)
def test_transformers_loads_it_and_it_is_near_the_fine_tune(
    make_delta: Callable[..., tuple[Pair, Path]], console: Console, tmp_path: Path, case: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair, folder = make_delta(**PAIRS[case])
    merge(str(pair.base), folder, tmp_path / "merged", "float32", False, console)

    def logits(path: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        tokens = AutoTokenizer.from_pretrained(path)("An example.", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(tokens).logits.float()

    base, merged, finetuned = (logits(p) for p in (pair.base, tmp_path / "merged", pair.finetuned))
    assert (merged - finetuned).norm() < 0.3 * (base - finetuned).norm()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config


def test_large_checkpoints_are_sharded(
    make_delta: Callable[..., tuple[Pair, Path]],
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    pair, folder = make_delta()
    merge(str(pair.base), folder, tmp_path / "one", None, False, console)
    monkeypatch.setattr(module, "SHARD_BYTES", 150_000)
    merge(str(pair.base), folder, tmp_path / "many", None, False, console)
    shards = sorted((tmp_path / "many").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 150_000 + 4096
    assert not (tmp_path / "many" / SINGLE).exists()
    total = json.loads((tmp_path / "many" / INDEX).read_text())["metadata"]["total_size"]
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert total == sum(stored.nbytes for stored in one.tensors.values())
    assert all(torch.equal(one.load(name), many.load(name)) for name in one.tensors)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_tenants_own_files_win(
    make_pair: Callable[..., Pair], compress: Callable[..., str], console: Console, tmp_path: Path
) -> None:
    pair = make_pair()
    (pair.base / "chat_template.jinja").write_text("base")
    (pair.finetuned / "chat_template.jinja").write_text("tenant")
    compress(pair, tmp_path / "delta")
    merge(str(pair.base), tmp_path / "delta", tmp_path / "merged", None, False, console)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "tenant"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (pair.base / name).read_bytes()


def test_another_base_is_refused(
    make_delta: Callable[..., tuple[Pair, Path]], console: Console, tmp_path: Path
) -> None:
    pair, folder = make_delta()
    with pytest.raises(PrinMixError, match="not the base that the delta was made from") as caught:
        merge(str(pair.finetuned), folder, tmp_path / "merged", None, False, console)
    assert str(pair.finetuned) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "calibration.txt", "delta", "tuned"]


def test_damaged_delta_is_refused(
    make_delta: Callable[..., tuple[Pair, Path]], console: Console, tmp_path: Path
) -> None:
    pair, folder = make_delta()
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-100] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(PrinMixError, match="damaged"):
        merge(str(pair.base), folder, tmp_path / "merged", None, False, console)
    assert not (tmp_path / "merged").exists()


def test_existing_output_is_kept_unless_asked(
    make_delta: Callable[..., tuple[Pair, Path]], console: Console, tmp_path: Path
) -> None:
    pair, folder = make_delta()
    (tmp_path / "merged").mkdir()
    with pytest.raises(PrinMixError, match=r"already there.*--overwrite"):
        merge(str(pair.base), folder, tmp_path / "merged", None, False, console)
    merge(str(pair.base), folder, tmp_path / "merged", None, True, console)
    assert Checkpoint(tmp_path / "merged").tensors


def test_full_disk_leaves_nothing(
    make_delta: Callable[..., tuple[Pair, Path]],
    console: Console,
    tmp_path: Path,
    file_size_limit: Callable[[int], Any],
) -> None:
    pair, folder = make_delta()
    with file_size_limit(100_000), pytest.raises(PrinMixError, match="the disk is full"):
        merge(str(pair.base), folder, tmp_path / "merged", None, False, console)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "calibration.txt", "delta", "tuned"]
