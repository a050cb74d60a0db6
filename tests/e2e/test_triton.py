"""The Triton kernels in the real server: arena, slots and batches as on a GPU, kernels interpreted."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.demo.train import train_small_pair
from benchmarks.greedy import load_reference
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from tests.e2e import plugins, triton_on_cpu
from tests.e2e.checks import assert_equal_to_reference
from tests.e2e.client import complete_together
from tests.e2e.conftest import FLOAT32, ROOT
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods.gptq import Gptq
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress

# Interpreting takes seconds where a GPU takes microseconds: small models, three tenants of one fine-tune.
METHODS = {"joint": PrinMix(), "published": Paper(solver="exact"), "matrix": Gptq(bits=(2,))}
PROMPT, TOKENS = 24, 2  # tokens; more than 16 rows of a tenant are prefill to the kernels


@pytest.fixture(scope="module")
def models() -> Path:
    """A tiny base and its fine-tune, the same as test_architectures'."""
    folder = ROOT / "build" / "test-models" / "qwen3-tied"
    train_small_pair(folder, architecture="qwen3", tied=True, console=Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tenant -> its merged checkpoint, beside the folder ``deltas``."""
    folder, console = tmp_path_factory.mktemp("tenants"), Console(quiet=True)
    found = {}
    for name, method in METHODS.items():
        options = Options(
            base=str(models / "base"),
            finetuned=str(models / "reverse"),
            out=folder / "deltas" / name,
            calibration=str(models / "calibration" / "reverse.txt"),
            method=method,
            ratio=None if method.has_own_size else Fraction(1, 8),
            samples=32,
        )
        compress(options, console)
        found[name] = folder / name
        merge(options.base, options.out, found[name], "float32", False, console)
    return found


@pytest.fixture(scope="module")
def interpreted(
    models: Path, merged: dict[str, Path], logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """Fewer slots than tenants, so that a slot changes hands; batches for both of the kernels' shapes."""
    plugin = plugins.install(triton_on_cpu.__file__, tmp_path_factory.mktemp("plugin"))
    deltas = next(iter(merged.values())).parent / "deltas"
    arguments = ("--enable-prinmix", "--deltas", str(deltas), "--max-deltas", "2", *SMALL_MACHINE_ARGUMENTS)
    environment = {**plugin, "TRITON_INTERPRET": "1"}
    with VllmServer(
        models / "base",
        *arguments,
        *FLOAT32,
        "--max-num-batched-tokens",
        "72",
        log=logs / "triton.log",
        environment=environment,
    ) as server:
        yield server


def test_equal_to_the_merged_checkpoints(
    interpreted: VllmServer, models: Path, merged: dict[str, Path]
) -> None:
    """All tenants and the base in flight at once, with log-probs of prompt tokens (the head's other path)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    prompt = tokenizer.encode(inspect.getsource(json.decoder), add_special_tokens=False)[:PROMPT]
    checkpoints = {"base": models / "base", **merged}
    replies = complete_together(interpreted.url, [(name, prompt) for name in checkpoints], tokens=TOKENS)
    for checkpoint, reply in zip(checkpoints.values(), replies, strict=True):
        model: torch.nn.Module = load_reference(checkpoint)
        assert_equal_to_reference(model, [prompt], [reply])
    assert len({tuple(reply.logprobs) for reply in replies}) == len(replies), "two tenants answer alike"
    assert "slots of" in interpreted.log.read_text(), "these were not the Triton kernels"
