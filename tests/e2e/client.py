"""Small clients for the tests: completions on token ids, with the log-probs of every token."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

# One client for all: each new one reads the system's certificates, 50 ms of work that a busy server on the
# same few cores can draw out to seconds.
HTTP = httpx.Client(verify=False, timeout=300)


@dataclass(frozen=True)
class Reply:
    """Token ids and their log-probs; prompt_logprobs[i]: token id -> log-prob at prompt position i + 1."""

    token_ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[dict[int, float]]


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return HTTP.post(f"{url}{path}", json=body)


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


@dataclass
class Stream:
    """When a streamed request was sent and when each of its tokens came, in seconds of time.monotonic()."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    def longest_gap(self, start: float, stop: float) -> float:
        """The longest wait for a token that overlaps the time from ``start`` to ``stop``, in seconds."""
        pairs = itertools.pairwise(self.times)
        return max(later - earlier for earlier, later in pairs if later > start and earlier < stop)


def stream(url: str, model: str, prompt: list[int], tokens: int, into: Stream | None = None) -> Stream:
    """Stream exactly ``tokens`` tokens; ``into`` is filled as they come, for another thread to watch."""
    found = Stream() if into is None else into
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    found.sent = time.monotonic()
    with HTTP.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.times.append(time.monotonic())
    return found


def metric(url: str, name: str) -> float:
    """Sum of a Prometheus counter over its labels."""
    text = HTTP.get(f"{url}/metrics").text
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{")]
    assert values, f"no metric {name}"
    return sum(values)
