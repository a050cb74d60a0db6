"""The way that deltas go on a GPU, in the real server on the CPU, with both of vLLM's model runners.

Arena, slots and batches in front of interpreted Triton kernels; vLLM's defaults for a GPU: torch.compile by
pieces with inductor, CUDA graphs of the pieces and of whole decoding steps (pretended ones, which launch
again what was captured), asynchronous scheduling.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.demo.train import train_small_pair
from benchmarks.greedy import load_reference
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from tests.e2e import gpu_on_cpu, plugins
from tests.e2e.checks import assert_equal_to_reference
from tests.e2e.client import complete, complete_together
from tests.e2e.conftest import FLOAT32, ROOT
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods.gptq import Gptq
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress

# Interpreting takes seconds where a GPU takes microseconds: small models, three tenants of one fine-tune.
METHODS = {"joint": PrinMix(), "published": Paper(solver="exact"), "matrix": Gptq(bits=(2,))}
PROMPT, TOKENS = 24, 3  # tokens; more than 16 rows of a tenant are prefill to the kernels
ROWS = 72  # in a batch, so that prompts are cut
CAPTURED = [1, 2, 4, 48]  # rows; larger batches run without a graph
COMPILATION = {
    "cudagraph_capture_sizes": CAPTURED,
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},  # not in vLLM's build for the CPU
}


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


@pytest.fixture(scope="module", params=["V1", "V2", "V2 on two ranks"])
def as_on_a_gpu(
    request: pytest.FixtureRequest,
    models: Path,
    merged: dict[str, Path],
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VllmServer]:
    """Fewer slots than tenants, so that a slot changes hands; batches for both of the kernels' shapes."""
    name = gpu_on_cpu.__name__
    plugin = plugins.install(tmp_path_factory.mktemp("plugin"), f"{name}.plugin", triton_backend=name)
    deltas = next(iter(merged.values())).parent / "deltas"
    arguments = (
        *("--enable-prinmix", "--deltas", str(deltas), "--max-deltas", "2"),
        *("--max-num-batched-tokens", str(ROWS), "--async-scheduling"),
        *("--compilation-config", json.dumps(COMPILATION)),
        # Warm-up runs kernels of vLLM's that Triton's interpreter cannot.
        *("--kernel-config", json.dumps({"enable_jit_warmup": False})),
        *SMALL_MACHINE_ARGUMENTS,
        *FLOAT32,
    )
    runner, _, ranks = request.param.partition(" on ")
    environment = {
        **plugin,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2")),
    }
    if ranks:
        arguments = (*arguments, "--tensor-parallel-size", "2")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    log = logs / f"gpu-on-cpu-{request.param.replace(' ', '-')}.log"
    with VllmServer(models / "base", *arguments, log=log, environment=environment) as server:
        yield server


def test_equal_to_the_merged_checkpoints(
    as_on_a_gpu: VllmServer, models: Path, merged: dict[str, Path]
) -> None:
    """All tenants and the base in flight at once, with log-probs of prompt tokens (the head's other path)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    prompt = tokenizer.encode(inspect.getsource(json.decoder), add_special_tokens=False)[:PROMPT]
    checkpoints = {"base": models / "base", **merged}
    replies = complete_together(as_on_a_gpu.url, [(name, prompt) for name in checkpoints], tokens=TOKENS)
    for checkpoint, reply in zip(checkpoints.values(), replies, strict=True):
        model: torch.nn.Module = load_reference(checkpoint)
        assert_equal_to_reference(model, [prompt], [reply])
    assert len({tuple(reply.logprobs) for reply in replies}) == len(replies), "two tenants answer alike"
    log = as_on_a_gpu.log.read_text()
    assert "slots of" in log, "these were not the Triton kernels"
    assert "PrinMixAsyncScheduler" in log
    assert re.search(r"replay of a graph with [1-9]\d* launches of PrinMix", log), "no graph had deltas"


def test_the_base_launches_nothing(as_on_a_gpu: VllmServer) -> None:
    """A batch of the base alone replays graphs that were captured without deltas."""
    before = len(as_on_a_gpu.log.read_text())
    complete(as_on_a_gpu.url, "base", [5] * PROMPT, tokens=TOKENS)
    launches = re.findall(r"replay of a graph with (\d+) launches", as_on_a_gpu.log.read_text()[before:])
    assert launches
    assert set(launches) == {"0"}


def test_nothing_is_compiled_for_requests(as_on_a_gpu: VllmServer) -> None:
    """Warm-up launches every kernel for every kind of argument: compiling would hold up the other requests.

    After the tests above, whose requests came after the start.
    """
    start, requests = as_on_a_gpu.log.read_text().split("Application startup complete", 1)
    assert "first launch of" in start
    assert "first launch of" not in requests
