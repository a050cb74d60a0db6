"""vLLM plugins for tests, installed by a folder with a module and an entry point on PYTHONPATH."""

from __future__ import annotations

import shutil
from pathlib import Path


def install(source: str, folder: Path) -> dict[str, str]:
    """Make ``source``, a module with `register`, a plugin in ``folder``; the environment that loads it."""
    name = "prinmix_test_" + Path(source).stem
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")
    shutil.copy(source, folder / f"{name}.py")
    return {"PYTHONPATH": str(folder)}
