"""Served replies against the reference model."""

from __future__ import annotations

import torch

from benchmarks.greedy import compare
from tests.e2e.client import Reply

LOGPROB_TOLERANCE = 1e-4


def assert_equal_to_reference(model: torch.nn.Module, prompts: list[list[int]], replies: list[Reply]) -> None:
    """Greedy tokens equal up to near ties; log-probs of tokens and of prompt tokens within 1e-4."""
    found = compare(model, [(p, r.token_ids) for p, r in zip(prompts, replies, strict=True)])
    for number, (prompt, reply, reference) in enumerate(zip(prompts, replies, found, strict=True)):
        assert reference.equal, f"prompt {number}: {reply.token_ids}"
        for i, (token, logprob) in enumerate(zip(reply.token_ids, reply.logprobs, strict=True)):
            expected = float(reference.logprobs[len(prompt) - 1 + i, token])
            assert abs(logprob - expected) < LOGPROB_TOLERANCE, f"prompt {number}, token {i}"
        for i, position in enumerate(reply.prompt_logprobs):
            for token, logprob in position.items():
                expected = float(reference.logprobs[i, token])
                assert abs(logprob - expected) < LOGPROB_TOLERANCE, f"prompt {number}, prompt token {i + 1}"
