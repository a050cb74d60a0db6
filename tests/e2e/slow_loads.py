"""A second vLLM plugin, for tests: makes the loading of some tenants' deltas slow.

Installed by putting a folder with this file and an entry point on PYTHONPATH (`install`).
"""

from __future__ import annotations

import os
import shutil
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


def install(folder: Path, start: str, seconds: float) -> dict[str, str]:
    """Write the plugin into ``folder``; returns the environment that makes vLLM load it."""
    info = folder / "prinmix_test_slow_loads-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prinmix-test-slow-loads\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nslow = prinmix_test_slow_loads:register\n"
    )
    shutil.copy(__file__, folder / "prinmix_test_slow_loads.py")
    return {"PYTHONPATH": str(folder), VARIABLE: f"{start}:{seconds}"}
