"""A `vllm serve` process to run things against: started, waited for, and ended with all its children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from vllm_prinmix.errors import PrinMixError

# Small machines: vLLM would otherwise claim a large share of memory for its KV cache.
SMALL_MACHINE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
SMALL_MACHINE_ARGUMENTS = ("--gpu-memory-utilization", "0.3")


class VllmServer:
    """Context manager around `vllm serve MODEL ARGUMENTS...` on a free port of this machine.

    log: file that gets the server's output. environment: added to this process's. start_seconds: how long
    it may take until it answers. Raises PrinMixError, with the log's last lines, when it ends or is late.
    """

    def __init__(
        self,
        model: str | Path,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        start_seconds: float = 300,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.command = [
            *_vllm(),
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *arguments,
        ]
        self._environment = {**os.environ, **SMALL_MACHINE, **(environment or {})}
        self._start_seconds = start_seconds
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> VllmServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            # A session of its own, so that the engine and the workers can be ended together with it.
            self._process = subprocess.Popen(
                self.command, stdout=out, stderr=out, env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + self._start_seconds
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                code = self._process.poll()
                self.stop()
                raise PrinMixError(
                    "the server did not start" if code is None else f"the server ended with exit code {code}",
                    where=self.log,
                    found="\n".join(self.log.read_text(errors="replace").splitlines()[-15:]),
                )
            time.sleep(0.3)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the whole process group: politely first, then for good."""
        if self._process is None:
            return
        for sign, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 10)):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process = None

    def resident_bytes(self) -> int:
        """Memory of all the server's processes; what several of them map counts once."""
        assert self._process is not None, "the server does not run"
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(stat.read_text().rpartition(")")[2].split()[3])
                if session == self._process.pid:
                    lines = stat.with_name("smaps_rollup").read_text().splitlines()
                    total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except (OSError, StopIteration):  # it has just ended
                continue
        return total

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


def _vllm() -> list[str]:
    """The command: of this environment, or the module where vLLM is only on PYTHONPATH."""
    command = Path(sys.executable).with_name("vllm")
    return [str(command)] if command.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
