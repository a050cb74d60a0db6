"""vLLM plugins for tests, installed by a folder with entry points on PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, module: str, triton_backend: str | None = None) -> dict[str, str]:
    """Make ``module``'s `register` a vLLM plugin, by way of ``folder``; the environment that loads it.

    triton_backend: a package to be Triton's backend "cpu".
    """
    info = folder / "prinmix_test_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prinmix-test-plugin\nVersion: 1.0\n")
    points = f"[vllm.general_plugins]\nprinmix_test = {module}:register\n"
    if triton_backend is not None:
        points += f"[triton.backends]\ncpu = {triton_backend}\n"
    (info / "entry_points.txt").write_text(points)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
