"""A vLLM plugin for tests: makes the loading of some tenants' deltas slow."""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "PRINMIX_TEST_SLOW_LOADS"  # "start of the tenants' names:seconds"


def register() -> None:
    from vllm_prinmix.format import delta

    start, _, seconds = os.environ[VARIABLE].partition(":")
    read = delta.read_delta

    def slow(folder: Path) -> delta.Delta:
        if Path(folder).name.startswith(start):
            time.sleep(float(seconds))
        return read(folder)

    delta.read_delta = slow
