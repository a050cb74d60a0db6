"""The GPU script and its serving part, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_serving import Parts, medians, step_seconds
from vllm_prinmix.errors import PrinMixError

ROOT = Path(__file__).parents[2]


class Handler(BaseHTTPRequestHandler):
    """Answers with as many tokens as were asked for, but never more than 50 for the model "short"."""

    asked: list[tuple[str, int]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((body["model"], body["max_tokens"]))
        made = min(body["max_tokens"], 50) if body["model"] == "short" else body["max_tokens"]
        answer = json.dumps({"usage": {"completion_tokens": made}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_steps_ask_every_model_for_short_and_long_answers(url: str) -> None:
    found = medians({"x": (url, ["a", "b", "a"]), "y": (url, ["c"])}, rounds=2)
    assert set(found) == {"x", "y"}
    assert len(Handler.asked) == 3 * 2 * (3 + 1)
    assert {tokens for _, tokens in Handler.asked} == {16, 112}


def test_an_answer_that_ends_early_is_an_error(url: str) -> None:
    with pytest.raises(PrinMixError, match="another length"):
        step_seconds(url, ["short"])


def test_parts_go_on_after_a_failure(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts.txt", time.monotonic() + 100)
    assert not parts.run("first", lambda: str(1 / 0))
    assert parts.run("second", lambda: "fine")
    parts.deadline = time.monotonic() - 1
    assert not parts.run("third", lambda: "too late")
    lines = (tmp_path / "parts.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "first: FAILED: division by zero",
        "second: passed: fine",
        "third: FAILED: the time was over before it began",
    ]
    assert parts.failed == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU" in (tmp_path / "parts.txt").read_text()
    assert "torch" in (tmp_path / "machine.txt").read_text()
