"""Serve generated deltas on a GPU and measure: two traces of arrivals, and the decoding step.

    python -m benchmarks.gpu_serving --base build/gpu/base --deltas build/gpu/deltas --out build/gpu

The step is measured for requests of the base alone, beside a server that has no plugin, and for tenants. A
part that fails does not stop the others. Written to --out: serving.json, the servers' logs, a folder for each
trace, and a line for each part in parts.txt.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from benchmarks.records import write_file
from benchmarks.replay import list_models, pick_tenants
from benchmarks.server import VllmServer
from vllm_prinmix.errors import PrinMixError

# Tried in this order; the first with which the server starts is taken.
FLAGS = [
    """--compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'""",
    "--enforce-eager",
]
COMMON = "--load-format dummy --dtype bfloat16 --max-model-len 2048 --max-num-seqs 64"
POPULARITIES = ("uniform", "zipf:1.5")
REQUESTS = 8  # at a time, where the step is measured
PROMPT = list(range(10, 26))
ANSWERS = (16, 112)  # tokens: what the longer answer takes more is steps alone
ROUNDS = 5
TENANTS = (1, 2, 4, 8)  # in a batch of REQUESTS


class Parts:
    """What passed and what did not: printed, and appended to ``path`` a line at a time."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline, self.failed = path, deadline, 0

    def run(self, name: str, part: Callable[[], str]) -> bool:
        """``part`` returns what to say about its result."""
        begin = time.monotonic()
        try:
            if begin > self.deadline:
                raise PrinMixError("the time was over before it began")
            text, passed = f"passed: {part()}", True
        except Exception as error:  # the parts after it may still work
            self.failed += 1
            lines = str(error).strip().splitlines()
            text, passed = f"FAILED: {lines[0] if lines else type(error).__name__}", False
        line = f"{name}: {text} ({time.monotonic() - begin:.0f} s)"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
        return passed

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.deadline - time.monotonic(), 1.0)


def start(
    stack: ExitStack, base: Path, log: Path, arguments: str, seconds: float, plugins: str | None = None
) -> VllmServer:
    """A server on ``base`` that ends with ``stack``."""
    environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    server = VllmServer(
        base, *shlex.split(arguments), log=log, environment=environment, start_seconds=seconds
    )
    return stack.enter_context(server)


def step_seconds(url: str, models: list[str]) -> float:
    """A decoding step's time in a batch of one request for each of ``models``."""
    short, long = (_answers(url, models, tokens) for tokens in ANSWERS)
    return (long - short) / (ANSWERS[1] - ANSWERS[0])


def _answers(url: str, models: list[str], tokens: int) -> float:
    """Seconds until all of a batch have ``tokens`` more tokens."""

    def ask(model: str) -> None:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            made = json.load(response)["usage"]["completion_tokens"]
        if made != tokens:
            raise PrinMixError("an answer has another length", found=made, expected=tokens)

    with ThreadPoolExecutor(len(models)) as pool:
        begin = time.perf_counter()
        list(pool.map(ask, models))
        return time.perf_counter() - begin


def medians(batches: dict[str, tuple[str, list[str]]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median step of each batch (url, models) in seconds. The batches take turns, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(rounds + 1):
        for name, batch in batches.items():
            times[name].append(step_seconds(*batch))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def replay(url: str, popularity: str, out: Path, rate: float, duration: float, left: float) -> str:
    """A trace by benchmarks.arrival_rate into ``out``; what it gave in a few words."""
    command = [sys.executable, "-m", "benchmarks.arrival_rate", "--url", url, "--popularity", popularity]
    command += ["--rate", str(rate), "--duration", str(duration), "--output-tokens", "16"]
    command += ["--timeout", str(min(60.0, left)), "--out", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=left, check=False)
    if done.returncode:
        raise PrinMixError(f"benchmarks.arrival_rate ended with {done.returncode}; its log is {out / 'log'}")
    report = json.loads((out / "report.json").read_text())
    if report["failures"]:
        raise PrinMixError(
            "requests failed", where=out / "results.jsonl", found=next(iter(report["failures"]))
        )
    return f"{report['run']['completed']} requests"


def main(
    base: Annotated[Path, Option(help="Of benchmarks.generate_delta.")],
    deltas: Annotated[Path, Option(help="Folder of deltas.")],
    out: Annotated[Path, Option(help="Folder for what is written.")] = Path("build/gpu"),
    max_deltas: Annotated[int, Option(help="Tenants in a batch.")] = 8,
    rate: Annotated[float, Option(help="Mean arrivals, requests/s.")] = 4.0,
    duration: Annotated[float, Option(help="Length of each trace, s.")] = 12.0,
    flags: Annotated[
        list[str], Option(help="More flags of both servers; given more than once: tried in this order.")
    ] = FLAGS,
    memory: Annotated[float, Option(help="--gpu-memory-utilization of the server with deltas.")] = 0.55,
    plain_memory: Annotated[float, Option(help="... of the server without the plugin.")] = 0.3,
    seconds: Annotated[float, Option(help="Parts that have not begun by then are left out.")] = 240.0,
) -> None:
    """Serve, replay, measure; exit code 1 where a part failed."""
    # The servers are in sessions of their own: who ends this program means them too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out / "parts.txt", time.monotonic() + seconds)
    tenants = [path.name for path in deltas.iterdir() if path.is_dir()] if deltas.is_dir() else []
    if not tenants:
        error = PrinMixError("there are no deltas", where=deltas, fix="run benchmarks.generate_delta")
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    result: dict[str, Any] = {"max_deltas": max_deltas, "tenants": len(tenants), "rate": rate}
    with ExitStack() as stack:
        # Also when this program is ended before it is done.
        stack.callback(
            lambda: write_file(out / "serving.json", json.dumps(result, indent=1).encode() + b"\n")
        )
        served: list[VllmServer] = []

        def serve() -> str:
            options = f"--enable-prinmix --max-deltas {max_deltas} --max-cpu-deltas {len(tenants)}"
            options += f" --gpu-memory-utilization {memory} --deltas {shlex.quote(str(deltas))}"
            for i, extra in enumerate(flags):
                log, begin = out / f"server-{i}.log", time.monotonic()
                try:
                    server = start(stack, base, log, f"{COMMON} {options} {extra}", parts.left)
                except PrinMixError as error:
                    print(f"not with {extra}: {error.what}; see {log}", flush=True)
                    continue
                served.append(server)
                result["flags"], result["start_seconds"] = extra, time.monotonic() - begin
                return f"with {extra}"
            raise PrinMixError("the server starts with none of the flags", where=out)

        if parts.run("serve", serve):
            url, extra = served[0].url, result["flags"]

            def arrivals(popularity: str, folder: Path) -> str:
                return replay(url, popularity, folder, rate, duration, parts.left)

            for popularity in POPULARITIES:
                folder = out / f"arrivals-{popularity.replace(':', '-')}"
                parts.run(
                    f"arrivals {popularity}",
                    partial(arrivals, popularity, folder),
                )

            def steps() -> str:
                models = asyncio.run(list_models(url))
                names = pick_tenants(models)
                counts = [n for n in TENANTS if n <= min(len(names), max_deltas)]
                found = medians({str(n): (url, [names[i % n] for i in range(REQUESTS)]) for n in counts})
                result["tenant_step_seconds"] = found
                return ", ".join(f"{n} tenants {1e3 * s:.2f} ms" for n, s in found.items())

            def base_only() -> str:
                options = f"{COMMON} --gpu-memory-utilization {plain_memory} {extra}"
                plain = start(stack, base, out / "server-plain.log", options, parts.left, plugins="none")
                name = next(n for n, parent in asyncio.run(list_models(url)).items() if parent is None)
                batch = [name] * REQUESTS
                found = medians({"with_plugin": (url, batch), "without_plugin": (plain.url, batch)})
                result["base_step_seconds"] = found
                return ", ".join(f"{n} {1e3 * s:.3f} ms" for n, s in found.items())

            parts.run("step with tenants", steps)
            parts.run("step of the base", base_only)
    if parts.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
