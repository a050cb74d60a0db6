"""Served tenants answer as their merged checkpoints do in transformers: float32, real server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.demo.pipeline import Family
from benchmarks.greedy import compare
from benchmarks.server import VllmServer
from tests.e2e.checks import assert_equal_to_reference
from tests.e2e.client import HTTP, complete, complete_together, metric, post
from tests.e2e.conftest import FLOAT32, ROOT, prinmix_arguments

NAMES = ["base", "tenant 0", "tenant 1", "tenant 2"]


def resolve(name: str, family: Family) -> str:
    return name if name == "base" else family.tenants[int(name[-1])].name


@pytest.mark.parametrize("name", NAMES)
def test_alone(
    name: str, server: VllmServer, family: Family, prompts: list[list[int]], references: dict
) -> None:
    model = resolve(name, family)
    replies = [complete(server.url, model, prompt) for prompt in prompts]
    assert_equal_to_reference(references[model], prompts, replies)


def test_all_tenants_in_flight_at_once_with_more_tenants_than_slots(
    server: VllmServer, family: Family, prompts: list[list[int]], references: dict
) -> None:
    jobs = [(model, prompt) for prompt in prompts for model in references]
    replies = complete_together(server.url, jobs)
    for model, reference in references.items():
        own = [reply for reply, job in zip(replies, jobs, strict=True) if job[0] == model]
        assert_equal_to_reference(reference, prompts, own)


def test_prefix_caching_never_mixes_tenants(
    server: VllmServer, prompts: list[list[int]], references: dict
) -> None:
    """The same long prompts to every tenant and the base, twice: hits there are, and only of one's own."""
    long = [p for p in prompts if len(p) > 140]
    body = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    before = metric(server.url, "vllm:prefix_cache_hits_total")
    for _ in range(2):
        for model, reference in references.items():
            answers = []
            for prompt in long:
                # Without prompt log-probs, which would keep the cache from being read.
                reply = post(server.url, "/v1/completions", {"model": model, "prompt": prompt, **body})
                answers.append((prompt, reply.json()["choices"][0]["token_ids"]))
            assert all(c.equal for c in compare(reference, answers)), model
    hits = metric(server.url, "vllm:prefix_cache_hits_total") - before
    assert hits >= 128 * len(long) * len(references), "every second request finds at least its first block"


def test_streaming_and_chat_answer_like_completions(server: VllmServer, family: Family) -> None:
    tenant = family.tenants[0]
    question = tenant.questions[0]
    chat = {
        "model": tenant.name,
        "messages": question.messages,
        "max_tokens": 16,
        "temperature": 0,
        "logprobs": True,
    }
    whole = post(server.url, "/v1/chat/completions", chat).json()
    text = whole["choices"][0]["message"]["content"]
    assert whole["model"] == tenant.name
    assert len(whole["choices"][0]["logprobs"]["content"]) == whole["usage"]["completion_tokens"]
    plain = post(
        server.url,
        "/v1/completions",
        {"model": tenant.name, "prompt": question.prompt, "max_tokens": 16, "temperature": 0},
    ).json()
    assert plain["choices"][0]["text"] == text
    pieces = []
    url = f"{server.url}/v1/chat/completions"
    with HTTP.stream("POST", url, json={**chat, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    assert "".join(pieces) == text


def test_models_lists_base_and_tenants(server: VllmServer, family: Family) -> None:
    cards = HTTP.get(f"{server.url}/v1/models").json()["data"]
    parents = {card["id"]: card["parent"] for card in cards}
    assert parents == {"base": None} | {tenant.name: "base" for tenant in family.tenants}


def test_the_arrival_rate_benchmark_runs_against_it(server: VllmServer, family: Family, tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.arrival_rate", "--url", server.url, "--out", str(tmp_path)]
    load = ["--rate", "2", "--duration", "8", "--popularity", "zipf:1.5"]
    done = subprocess.run([*command, *load], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["run"]["requests"] == report["run"]["completed"] > 0
    assert report["run"]["ttft_s"]["p99"] <= report["run"]["e2e_s"]["p99"]
    assert set(report["tenants"]) <= {tenant.name for tenant in family.tenants}
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_tensor_parallel(
    family: Family, prompts: list[list[int]], references: dict[str, torch.nn.Module], logs
) -> None:
    arguments = prinmix_arguments(
        family, "--tensor-parallel-size", "2", "--max-deltas", "2", "--max-cpu-deltas", "2", *FLOAT32
    )
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with VllmServer(family.base, *arguments, log=logs / "tp2.log", environment=environment) as tp2:
        jobs = [(model, prompt) for prompt in prompts for model in references]
        replies = complete_together(tp2.url, jobs)
    for model, reference in references.items():
        own = [reply for reply, job in zip(replies, jobs, strict=True) if job[0] == model]
        assert_equal_to_reference(reference, prompts, own)
