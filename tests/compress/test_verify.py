"""`prinmix verify` must find what is wrong, not only pass what is right (test_run.py does that)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.compress.pairs import Pair
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import SINGLE
from vllm_prinmix.format.delta import read_delta, write_delta
from vllm_prinmix.format.schema import DeltaConfig

NORM = "model.norm.weight"
LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


@pytest.fixture
def delta(pair: Pair, compress: Callable[..., str], tmp_path: Path) -> Path:
    compress(pair, tmp_path / "delta")
    return tmp_path / "delta"


def rewrite(folder: Path, change: Callable[[DeltaConfig, dict[str, torch.Tensor]], Any]) -> None:
    """Change a delta and write it with right checksums, as a faulty compressor would.

    ``change`` edits the tensors in place, and may return another config.
    """
    read = read_delta(folder)
    changed = change(read.config, read.tensors)
    config = changed if isinstance(changed, DeltaConfig) else read.config
    write_delta(folder, config, {name: tensor.clone() for name, tensor in read.tensors.items()})


def test_without_fine_tune_sizes_are_measured(pair: Pair, delta: Path, console: Console) -> None:
    entries = {e["name"]: e for e in verify(delta, str(pair.base), None, None, console)}
    assert set(entries[LINEAR]) == {"name", "change"}
    assert 0.08 < entries[LINEAR]["change"] < 0.12  # the fine-tune moved every matrix by a tenth of its norm


def test_one_changed_bit_of_the_base(pair: Pair, delta: Path, console: Console) -> None:
    tensors = load_file(pair.base / SINGLE)
    tensors[LINEAR].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, pair.base / SINGLE)
    with pytest.raises(PrinMixError, match="not the base that the delta was made from"):
        verify(delta, str(pair.base), None, None, console)


def test_wrong_codes(pair: Pair, delta: Path, console: Console) -> None:
    rewrite(delta, lambda config, tensors: tensors[LINEAR][:64].zero_())
    verify(delta, str(pair.base), None, None, console)
    with pytest.raises(PrinMixError, match=f"{LINEAR} has error .*, recorded is"):
        verify(delta, str(pair.base), str(pair.finetuned), None, console)


def test_infinite_scale(pair: Pair, delta: Path, console: Console) -> None:
    def change(config: DeltaConfig, tensors: dict[str, torch.Tensor]) -> None:
        directions = sum(c.directions for c in config.modules[LINEAR].classes)  # type: ignore[union-attr]
        size = -(-8 * directions // 16) * 16
        tensors[LINEAR][-size:].view(torch.float32)[0] = torch.inf

    rewrite(delta, change)
    with pytest.raises(PrinMixError, match=f"NaN or infinite numbers.*{LINEAR}"):
        verify(delta, str(pair.base), None, None, console)


def test_exact_tensor_that_is_not(pair: Pair, delta: Path, console: Console) -> None:
    rewrite(delta, lambda config, tensors: tensors[NORM].add_(1))
    with pytest.raises(PrinMixError, match=f"{NORM} is not the fine-tune's tensor"):
        verify(delta, str(pair.base), str(pair.finetuned), None, console)


def test_unchanged_tensor_that_is_not(pair: Pair, delta: Path, console: Console) -> None:
    def change(config: DeltaConfig, tensors: dict[str, torch.Tensor]) -> DeltaConfig:
        del tensors[NORM]
        modules = {name: spec for name, spec in config.modules.items() if name != NORM}
        return config.model_copy(update={"modules": modules, "unchanged": [NORM]})

    rewrite(delta, change)
    with pytest.raises(PrinMixError, match=f"{NORM} is called unchanged, but"):
        verify(delta, str(pair.base), str(pair.finetuned), None, console)


def test_wrong_recorded_error(pair: Pair, delta: Path, console: Console) -> None:
    def change(config: DeltaConfig, tensors: dict[str, torch.Tensor]) -> DeltaConfig:
        spec = config.modules[LINEAR]
        better = spec.model_copy(update={"report": spec.report | {"error": 1e-6}})  # type: ignore[union-attr]
        return config.model_copy(update={"modules": config.modules | {LINEAR: better}})

    rewrite(delta, change)
    verify(delta, str(pair.base), str(pair.finetuned), None, console)
    with pytest.raises(PrinMixError, match=f"{LINEAR} has error .*, recorded is 1e-06"):
        verify(delta, str(pair.base), str(pair.finetuned), str(pair.calibration), console)


def test_other_calibration_is_measured_but_not_compared(pair: Pair, delta: Path, console: Console) -> None:
    other = pair.calibration.with_name("other.txt")
    other.write_text("quite another text\nand one more\n")
    entries = verify(delta, str(pair.base), str(pair.finetuned), str(other), console)
    assert {e["name"]: e for e in entries}[LINEAR]["error"] > 0
    assert "errors are not compared" in console.file.getvalue()  # type: ignore[attr-defined]
