"""Time one decoder layer's deltas for a batch of tenants, beside what else could compute them.

    python -m benchmarks.kernels                            # on the GPU where there is one, else on the CPU
    python -m benchmarks.kernels --device cpu --shape tiny

All ways run side by side on the same generated deltas: ours on packed bytes; a batched product with dense
bfloat16 dW; dequantizing dW, then the product; bfloat16 factors of the same number of directions, as a LoRA
would be (on a GPU by vLLM's LoRA kernels). A plain copy gives the bandwidth that the machine has. What
cannot run is left out, with the reason. Written to --out: kernels.json, kernels.png.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from rich.progress import track
from typer import Option

from benchmarks import contenders_cpu
from benchmarks.generate_delta import SHAPES
from benchmarks.kernel_report import plot, reasons, table
from benchmarks.layer import Case
from benchmarks.records import write_file
from vllm_prinmix import __version__
from vllm_prinmix.errors import PrinMixError

# What is measured where the options do not say.
DEFAULTS = {
    "cpu": {"shape": "qwen2.5-0.5b", "tenants": "1,4,16", "tokens": "1,8,128", "seconds": 0.0},
    "cuda": {
        "shape": "qwen2.5-7b,qwen2.5-14b",
        "tenants": "1,4,16,64",
        "tokens": "1,8,512",
        "seconds": 150.0,
    },
}
TABLE_WIDTH = 130  # in a file
TOLERANCE = 0.02  # relative, between our outputs and those with a dense bfloat16 dW


class Bench(Protocol):
    copy_bytes_per_second: float

    def measure(self, case: Case) -> dict[str, Any]: ...


def pick_device(name: str) -> torch.device:
    """``name``: "cpu", "cuda", "cuda:N", or "" for a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in DEFAULTS:
        raise PrinMixError("unknown device", where="--device", found=name, expected="cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PrinMixError("torch finds no GPU here", where="--device", fix="leave --device out")
    return device


def parse_cases(shapes: str, tenants: str, tokens: str, ratios: str) -> list[Case]:
    """All combinations of the comma-separated options."""
    names = _list(shapes)
    for name in names:
        if name not in SHAPES:
            raise PrinMixError("unknown shape", where="--shape", found=name, expected=", ".join(SHAPES))
    try:
        counts = [[int(n) for n in _list(text)] for text in (tenants, tokens)]
        parts = [Fraction(r) for r in _list(ratios)]
    except (ValueError, ZeroDivisionError) as error:
        raise PrinMixError(
            "not a list of numbers", where="--tenants, --tokens, --ratios", found=error, expected="like 1,8"
        ) from None
    if min([*counts[0], *counts[1]], default=0) < 1 or not parts or not all(0 < r <= 1 for r in parts):
        raise PrinMixError(
            "a number is out of range",
            where="--tenants, --tokens, --ratios",
            expected="one tenant and token at least, and ratios above 0 and up to 1",
        )
    return [Case(s, n, m, r) for r in parts for s in names for n in counts[0] for m in counts[1]]


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def run(bench: Bench, cases: Iterable[Case]) -> list[dict[str, Any]]:
    """A line of the result for each case; those after an error that ends everything are missing."""
    lines = []
    for case in cases:
        try:
            line = bench.measure(case)
        except PrinMixError as error:
            lines.append(derived(case, {"seconds": {}, "failed": {"ours": str(error)}}, bench))
            break
        lines.append(derived(case, line, bench))
    return lines


def derived(case: Case, line: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """``line`` with the case before it and with what follows from its times."""
    found = line["seconds"]
    line = {
        "shape": case.shape,
        "ratio": str(case.ratio),
        "tenants": case.tenants,
        "tokens": case.tokens,
        **line,
    }
    if "ours" in found:
        line["bytes_per_second"] = line["packed_bytes"] / found["ours"]
        line["share_of_copy"] = line["bytes_per_second"] / bench.copy_bytes_per_second
        others = [name for name in ("dense", "lora", "dequantize") if name in found]
        line["speed_up"] = {name: found[name] / found["ours"] for name in others}
    if "base_and_ours" in found:
        line["with_base"] = found["base_and_ours"] / found["base"]
    error = line.get("errors", {}).get("ours", 0.0)
    if not error <= TOLERANCE:
        line["failed"]["ours"] = f"outputs differ by {100 * error:.1f} % from those with a dense dW"
    return line


def main(
    shape: Annotated[str, Option(help=f"Among {', '.join(SHAPES)}.")] = "",
    tenants: Annotated[str, Option(help="Numbers of tenants in a batch.")] = "",
    tokens: Annotated[str, Option(help="Tokens per tenant.")] = "",
    ratios: Annotated[str, Option(help="Bytes of a delta / 2 bytes per weight.")] = "1/16,1/32",
    device: Annotated[str, Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")] = "",
    threads: Annotated[int, Option(help="On the CPU; 0: torch's default.")] = 0,
    budget_seconds: Annotated[
        float | None, Option(help="On a GPU: cases that have not begun by then are left out.")
    ] = None,
    out: Annotated[Path, Option(help="Folder for what is written.")] = Path("build/kernels"),
) -> None:
    """Measure and show. Options left out depend on the device."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    try:
        where = pick_device(device)
        usual: dict[str, Any] = DEFAULTS[where.type]
        cases = parse_cases(
            shape or usual["shape"], tenants or usual["tenants"], tokens or usual["tokens"], ratios
        )
        bench: Bench
        if where.type == "cuda":
            from benchmarks import bench_gpu

            torch.cuda.set_device(where)
            bench = bench_gpu.Bench(where, usual["seconds"] if budget_seconds is None else budget_seconds)
        else:
            bench = contenders_cpu.Bench(threads)
        lines = run(bench, track(cases, "Measuring", console=console))
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    results = {
        "version": __version__,
        "machine": machine(where),
        "copy_bytes_per_second": bench.copy_bytes_per_second,
        "layers": lines,
    }
    write_file(out / "kernels.json", json.dumps(results, indent=1).encode() + b"\n")
    console.print(table(results))
    for text in reasons(results):
        console.print(text, markup=False, soft_wrap=True)
    plot(results, out / "kernels.png")
    console.print(f"Written to {out / 'kernels.json'} and {out / 'kernels.png'}.", markup=False)
    if any("ours" in line["failed"] and not _out_of_time(line) for line in lines):
        raise typer.Exit(1)


def _out_of_time(line: dict[str, Any]) -> bool:
    return "were over" in line["failed"]["ours"]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cpu":
        return {**found, "name": processor(), "threads": torch.get_num_threads()}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "toolkit": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), platform.machine())


if __name__ == "__main__":
    typer.run(main)
