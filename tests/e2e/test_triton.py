"""The way that deltas go on a GPU, in the real server on the CPU, with both of vLLM's model runners.

Arena, slots and batches in front of interpreted Triton kernels; asynchronous scheduling; torch.compile by
pieces with inductor, and CUDA graphs of the pieces and of whole decoding steps, which are vLLM's defaults for
a GPU. The graphs are pretended ones, which launch again what was captured.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.demo.train import train_small_pair
from benchmarks.greedy import compare, load_reference
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from tests.e2e import gpu_on_cpu, plugins
from tests.e2e.checks import assert_equal_to_reference
from tests.e2e.client import Reply, complete
from tests.e2e.conftest import ROOT
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods.gptq import Gptq
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.prepare import Options
from vllm_prinmix.compress.run import compress
from vllm_prinmix.kernels.segmented import DECODE_BATCH

READY = "Application startup complete"

# Interpreting takes seconds where a GPU takes microseconds: small models, three tenants of one fine-tune.
METHODS = {"joint": PrinMix(), "published": Paper(solver="exact"), "matrix": Gptq(bits=(2,))}
ROWS = 72  # in a batch: the longest prompt does not fit
PROMPTS = {"base": 30, "joint": 24, "published": 40, "matrix": 90}  # tokens
TOKENS = {"base": 60, "joint": 3, "published": 3, "matrix": 3}  # the base's goes on beside the tenants'
CAPTURED = [1, 4, 48]  # rows; larger batches run without a graph, those between in one that is too large
COMPILED = {
    "cudagraph_capture_sizes": CAPTURED,
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},  # not in vLLM's build for the CPU
}
NOT_COMPILED = {"cudagraph_capture_sizes": CAPTURED, "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


@dataclass(frozen=True)
class Case:
    """How a server goes the GPU's way."""

    runner: int  # vLLM's model runner, 1 or 2
    ranks: int = 1
    dtype: str = "float32"
    compilation: Mapping[str, Any] = field(default_factory=lambda: COMPILED)


CASES = {
    "V1": Case(1),
    "V2": Case(2),
    "V2 in bfloat16 on two ranks, graphs of decoding steps alone": Case(2, 2, "bfloat16", NOT_COMPILED),
}


@dataclass(frozen=True)
class Asked:
    """A server, and what it answered."""

    case: Case
    server: VllmServer
    prompts: Mapping[str, list[int]]
    replies: Mapping[str, Reply]

    @property
    def log(self) -> str:
        return self.server.log.read_text()


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


@pytest.fixture(scope="module", params=CASES)
def asked(
    request: pytest.FixtureRequest,
    models: Path,
    merged: dict[str, Path],
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Asked]:
    """Fewer slots than tenants, so one changes hands. All are asked at once, once all are in memory."""
    case, name, folder = CASES[request.param], gpu_on_cpu.__name__, tmp_path_factory.mktemp("server")
    environment = {
        **plugins.install(folder / "plugin", f"{name}.plugin", triton_backend=name),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(case.runner - 1),
        "VLLM_CACHE_ROOT": str(folder / "cache"),  # compiled graphs of the user's own vLLM are others
    }
    arguments = [
        *("--enable-prinmix", "--deltas", str(merged["joint"].parent / "deltas")),
        *("--max-deltas", "2", "--max-cpu-deltas", "4"),
        *("--max-num-batched-tokens", str(ROWS), "--async-scheduling"),
        *("--compilation-config", json.dumps(case.compilation)),
        # Warm-up runs kernels of vLLM's that Triton's interpreter cannot.
        *("--kernel-config", json.dumps({"enable_jit_warmup": False})),
        *("--dtype", case.dtype, "--max-model-len", "1024", "--served-model-name", "base"),
        *SMALL_MACHINE_ARGUMENTS,
    ]
    if case.ranks > 1:
        arguments += ["--tensor-parallel-size", str(case.ranks)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(case.ranks)))
    log = logs / f"gpu-on-cpu-{list(CASES).index(request.param)}.log"
    with VllmServer(models / "base", *arguments, log=log, environment=environment) as server:
        for tenant in merged:
            complete(server.url, tenant, [5], tokens=1)
        tokenizer = AutoTokenizer.from_pretrained(models / "base")
        text = tokenizer.encode(inspect.getsource(json.decoder), add_special_tokens=False)
        prompts = {model: text[10 * i :][:length] for i, (model, length) in enumerate(PROMPTS.items())}
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = pool.map(lambda m: complete(server.url, m, prompts[m], tokens=TOKENS[m]), prompts)
            replies = dict(zip(prompts, found, strict=True))
        yield Asked(case, server, prompts, replies)


def assert_answers(asked: Asked, checkpoint: Path, prompt: list[int], reply: Reply) -> None:
    model: torch.nn.Module = load_reference(checkpoint)
    if asked.case.dtype == "float32":
        assert_equal_to_reference(model, [prompt], [reply])
        return
    (found,) = compare(model, [(prompt, reply.token_ids)])
    expected = [found.logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(reply.token_ids)]
    assert reply.logprobs == pytest.approx([float(x) for x in expected], abs=0.05)


def test_equal_to_the_merged_checkpoints(asked: Asked, models: Path, merged: dict[str, Path]) -> None:
    """With log-probs of prompt tokens, which are the head's other path."""
    for model, checkpoint in {"base": models / "base", **merged}.items():
        assert_answers(asked, checkpoint, asked.prompts[model], asked.replies[model])
    several = {tuple(reply.logprobs) for reply in asked.replies.values()}
    assert len(several) == len(asked.replies), "two tenants answer alike"


def test_the_way_was_a_gpu_s(asked: Asked) -> None:
    """The batches and graphs that the test above is worth something for were there."""
    log = asked.log
    assert "slots of" in log, "these were not the Triton kernels"
    assert "PrinMixAsyncScheduler" in log
    assert ("Using V2 Model Runner" in log) == (asked.case.runner == 2)
    batch = r"batch of (\d+) rows, (\d+) of the base, (\d+) tenants"
    replay = r"replay of a (\w+) graph of (\d+) rows with (\d+)"
    steps = re.findall(f"{batch}|{replay}", log.split(READY, 1)[1])
    batches = [tuple(map(int, step[:3])) for step in steps if step[0]]
    assert any(base and tenants == 2 for _, base, tenants in batches)
    assert any(rows > DECODE_BATCH and tenants for rows, _, tenants in batches), "no prefill shapes"
    assert max(rows for rows, _, _ in batches) == ROWS, "no prompt was cut"
    padded, kinds, rows = False, set(), 0
    for batch_rows, _, tenants, kind, graph_rows, launches in steps:
        if batch_rows:
            rows, mixed = int(batch_rows), int(tenants) > 0
        elif int(launches):
            kinds.add(kind)
            padded |= kind == "FULL" and mixed and int(graph_rows) > rows
    assert kinds == ({"FULL", "PIECEWISE"} if asked.case.compilation is COMPILED else {"FULL"})
    assert padded, "no graph of a whole step had more rows than its batch"


def test_the_base_launches_nothing(asked: Asked) -> None:
    """Neither in graphs nor outside, with tenants in the slots."""
    for _ in range(2):  # the first one's first line tells of the step before it
        before = len(asked.log)
        complete(asked.server.url, "base", [5] * 24, tokens=3)
    said = asked.log[before:]
    assert set(re.findall(r"(\d+) launches until", said)) == {"0"}
    assert set(re.findall(r"with (\d+) launches of PrinMix", said)) == {"0"}


def test_a_tenant_that_comes_later(asked: Asked, merged: dict[str, Path]) -> None:
    """It fits into a slot that was reserved before it was there, and into captured graphs."""
    deltas = merged["joint"].parent / "deltas"
    shutil.copytree(deltas / "joint", deltas / "later", dirs_exist_ok=True)
    prompt = list(range(5, 17))
    reply = complete(asked.server.url, "later", prompt, tokens=2)
    shutil.rmtree(deltas / "later")  # the next server has to find it later, too
    assert_answers(asked, merged["joint"], prompt, reply)


def test_nothing_is_compiled_for_requests(asked: Asked) -> None:
    """What is launched for requests was launched at start for arguments of every kind that they bring."""
    start, requests = asked.log.split(READY, 1)
    assert "first launch of" in start
    assert "first launch of" not in requests
