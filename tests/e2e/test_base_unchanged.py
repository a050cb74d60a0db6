"""The base's own requests: as if the plugin were not there, flag or no flag."""

from __future__ import annotations

from benchmarks.demo.pipeline import Family
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from tests.e2e.client import HTTP, Reply, complete
from tests.e2e.conftest import FLOAT32, prinmix_arguments


def ask_base(server: VllmServer, prompts: list[list[int]]) -> list[Reply]:
    return [complete(server.url, "base", prompt) for prompt in prompts]


def test_log_probs_are_bit_identical_and_tokens_equal(
    family: Family, prompts: list[list[int]], server: VllmServer, logs
) -> None:
    """Both eager: the same bits. By default (vLLM compiles the plain server only): the same tokens."""
    plain = (*SMALL_MACHINE_ARGUMENTS, *FLOAT32)
    without_plugin = {"VLLM_PLUGINS": "none"}
    eager = "--enforce-eager"
    with VllmServer(
        family.base, *plain, eager, log=logs / "plain-eager.log", environment=without_plugin
    ) as running:
        expected = ask_base(running, prompts)
    with VllmServer(
        family.base, *prinmix_arguments(family, *FLOAT32, eager), log=logs / "prinmix-eager.log"
    ) as running:
        found = ask_base(running, prompts)
    assert found == expected

    with VllmServer(family.base, *plain, log=logs / "plain.log") as running:
        cards = HTTP.get(f"{running.url}/v1/models").json()["data"]
        default = ask_base(running, prompts)
    assert [card["id"] for card in cards] == ["base"], "without the flag there are no tenants"
    assert "PrinMix" not in (logs / "plain.log").read_text()
    assert [r.token_ids for r in ask_base(server, prompts)] == [r.token_ids for r in default]
