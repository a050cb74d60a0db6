"""The tests of the custom ops once more, with Triton kernels, in a process whose Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("test_ops.py")


def test_ops_on_interpreted_triton_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, env=environment, cwd=TESTS.parents[2], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
