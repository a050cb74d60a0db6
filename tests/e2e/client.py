"""Small clients for the tests: completions on token ids, with the log-probs of every token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Reply:
    """Token ids and their log-probs; prompt_logprobs[i]: token id -> log-prob at prompt position i + 1."""

    token_ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[dict[int, float]]


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=300)


def complete(url: str, model: str, prompt: list[int], tokens: int = 32, prompt_logprobs: int = 1) -> Reply:
    """Greedy, exactly ``tokens`` tokens."""
    response = post(
        url,
        "/v1/completions",
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "prompt_logprobs": prompt_logprobs,
            "return_token_ids": True,
        },
    )
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    prompt_part = [
        {int(token): entry["logprob"] for token, entry in position.items()}
        for position in choice["prompt_logprobs"][1:]
    ]
    return Reply(choice["token_ids"], choice["logprobs"]["token_logprobs"], prompt_part)


def complete_together(url: str, jobs: list[tuple[str, list[int]]], tokens: int = 32) -> list[Reply]:
    """All (model, prompt) jobs in flight at once."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: complete(url, *job, tokens=tokens), jobs))


def stream_times(
    url: str, model: str, prompt: list[int], tokens: int, started: list[float] | None = None
) -> list[float]:
    """Seconds from the request to each streamed token; ``started`` gets a mark at the first one."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times: list[float] = []
    begin = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic() - begin)
                if started is not None and not started:
                    started.append(time.monotonic())
    return times


def metric(url: str, name: str) -> float:
    """Sum of a Prometheus counter over its labels."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{")]
    assert values, f"no metric {name}"
    return sum(values)
