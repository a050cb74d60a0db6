"""The Triton kernels in the real server: arena, slots and batches as on a GPU, kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.demo.pipeline import Family
from benchmarks.server import VllmServer
from tests.e2e import plugins, triton_on_cpu
from tests.e2e.checks import assert_equal_to_reference
from tests.e2e.client import complete_together
from tests.e2e.conftest import FLOAT32, prinmix_arguments

TOKENS = 2


@pytest.fixture(scope="module")
def interpreted(family: Family, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """Fewer slots than tenants, so that a slot changes hands; batches for both of the kernels' shapes."""
    plugin = plugins.install(triton_on_cpu.__file__, tmp_path_factory.mktemp("plugin"))
    arguments = prinmix_arguments(family, "--max-deltas", "2", "--max-num-batched-tokens", "96", *FLOAT32)
    log = logs / "triton.log"
    environment = {**plugin, "TRITON_INTERPRET": "1"}
    with VllmServer(family.base, *arguments, log=log, environment=environment) as server:
        yield server


def test_equal_to_the_merged_checkpoints(
    interpreted: VllmServer,
    family: Family,
    prompts: list[list[int]],
    references: dict[str, torch.nn.Module],
) -> None:
    """All tenants and the base in flight at once, with log-probs of prompt tokens (the head's other path)."""
    names = ["base", *(tenant.name for tenant in family.tenants)]
    prompt = prompts[9]
    replies = complete_together(interpreted.url, [(name, prompt) for name in names], tokens=TOKENS)
    for name, reply in zip(names, replies, strict=True):
        assert_equal_to_reference(references[name], [prompt], [reply])
    assert "slots of" in interpreted.log.read_text(), "these were not the Triton kernels"
