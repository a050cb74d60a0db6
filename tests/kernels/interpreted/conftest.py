"""Interpreted in processes started with TRITON_INTERPRET=1 (Triton decides at import; see ../test_triton.py).

Without it these tests run compiled where there is a GPU, and are marked `gpu`.
"""

from pathlib import Path

import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
