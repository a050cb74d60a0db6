"""Time a compression, stage by stage, beside the straightforward implementation of the same method.

    python -m benchmarks.compression                                        # Qwen2.5-0.5B
    python -m benchmarks.compression --shape qwen2.5-7b --device cuda       # 4 of the 28 layers, scaled

A pair of checkpoints with random weights is generated (benchmarks.generate_pair), and its linears are
compressed as `prinmix compress` does it: layer by layer, from calibration samples to packed bytes. The
straightforward implementation (benchmarks.straightforward) does the first layers of the same pair. Each runs
in a process of its own, one after the other; times are scaled to the whole model. Written to --out:
compression.json, compression.png, compression.md.

Both take each matrix for itself. `prinmix` as it is by default, fitting layers to the compressed ones before
them, is a contender of its own, "compensated", without a straightforward one beside it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from typer import Option

from benchmarks.compression_report import PLAIN, markdown, plot, speed_ups, table
from benchmarks.generate_delta import SHAPES, Shape
from benchmarks.generate_pair import generate_pair
from benchmarks.kernels import TABLE_WIDTH, machine, pick_device
from benchmarks.records import write_file
from benchmarks.straightforward import Straightforward, second_moments, solver
from vllm_prinmix import __version__
from vllm_prinmix.compress.compensation import Fit, alone, replay
from vllm_prinmix.compress.measure import weight_error
from vllm_prinmix.compress.memory import trim
from vllm_prinmix.compress.methods.paper import compress_factors
from vllm_prinmix.compress.methods.prinmix import compress_jointly
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, read_architecture
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.ratio import budget
from vllm_prinmix.compress.stopwatch import Stopwatch
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.payload import decode, encode
from vllm_prinmix.kernels.quantized import QuantizedFactors

METHODS = {"prinmix": True, "prinmix-paper": False}  # by default compensated?
USUAL_LAYERS = {"qwen2.5-7b": 4}  # generated where --layers does not say; else all of them
# Laps of `compress_factors` that the others count as one stage.
JOINED = {"quantize V": "quantize", "correct U": "quantize", "quantize U": "quantize"}


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    method: str
    straightforward: bool
    compensated: bool
    folder: Path  # of the pair
    layers: int  # at most
    budget_seconds: float  # no layer begins that would not end by then, except the first
    samples: int
    tokens: int
    ratio: Fraction
    seed: int
    device: str
    threads: int

    @property
    def name(self) -> str:
        return self.method + self.straightforward * PLAIN + self.compensated * ", compensated"


def measure(task: Task, tell: Callable[[int], None]) -> dict[str, Any]:
    """Compress up to ``task.layers`` layers; ``tell`` hears how many are finished.

    Returns seconds by stage, the layers done, and of every matrix its error and payload bytes.
    """
    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    base, finetuned = (Checkpoint(task.folder / side) for side in ("base", "finetuned"))
    config = read_architecture(finetuned)
    model = build_model(config)
    random = torch.Generator().manual_seed(task.seed)
    samples = [
        torch.randint(config.vocab_size, (task.tokens,), generator=random) for _ in range(task.samples)
    ]
    names = [
        name
        for name, (kind, _) in expected_tensors(model).items()
        if kind is Kind.LINEAR and int(name.split(".")[2]) < task.layers
    ]
    per_layer = len(names) // task.layers
    watch, start, processor_start = Stopwatch(), time.perf_counter(), time.process_time()
    fits: Iterator[Fit]
    changes: dict[str, torch.Tensor] = {}  # of the current layer, as they are stored
    errors: dict[str, float] = {}
    payload_bytes: dict[str, int] = {}
    if task.straightforward:
        moments = second_moments(finetuned.folder, samples, task.layers, device)
        fits = alone((name, Hessian(moments.pop(name))) for name in names)
    else:
        chosen = set(names)
        fits = replay(model, base, finetuned, samples, changes.get, chosen, task.compensated, device)
    for fit in fits:
        name, hessian = fit.name, fit.hessian
        watch.lap("activations", device)
        dw = finetuned.load(name, torch.float32).to(device)
        dw -= base.load(name).to(device)
        dw = fit.target(dw)
        watch.lap("load", device)
        limit = budget(task.ratio, *dw.shape)
        if task.straightforward:
            work = Straightforward(dw, hessian.matrix, limit, watch)
            factors, errors[name] = work.prinmix() if task.method == "prinmix" else work.paper()
        else:
            factors, errors[name] = _compress(task.method, dw, hessian, limit, watch)
        spec, payload = encode(factors, {})
        decoded = decode(spec, payload).dense()
        weight_error(dw.cpu(), decoded)
        if task.compensated:
            changes[name] = decoded
        payload_bytes[name] = payload.numel()
        del dw, hessian, fit, decoded
        trim()
        watch.lap("store", device)
        done, rest = divmod(len(errors), per_layer)
        if not rest:
            tell(done)
            spent = time.perf_counter() - start
            if spent * (done + 1) / done > task.budget_seconds:
                break
            for old in [n for n in changes if n not in names[per_layer * (done - 1) :]]:
                del changes[old]
    return {
        "layers": len(errors) // per_layer,
        "seconds": watch.seconds,
        "cpu_seconds": time.process_time() - processor_start,
        "errors": errors,
        "payload_bytes": payload_bytes,
        "peak_bytes": _peak_bytes(),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _compress(
    method: str, dw: torch.Tensor, hessian: Hessian, limit: int, watch: Stopwatch
) -> tuple[QuantizedFactors, float]:
    """One matrix and its error, by the project's method with its fast solver."""
    _ = hessian.feedback  # computed at first use, and kept for all modules with the same input
    watch.lap("factorise", dw.device)
    if method == "prinmix":
        factors, found = compress_jointly(dw, hessian, limit, watch=watch)
        return factors, found["error"]
    factors, report = compress_factors(dw, hessian, budget_bytes=limit, solver="exact")
    watch.lap("report", dw.device)  # all of it, moved to its stages below
    for lap, seconds in report.seconds.items():
        stage = JOINED.get(lap, lap)
        watch.seconds["report"] -= seconds
        watch.seconds[stage] = watch.seconds.get(stage, 0.0) + seconds
    return factors, report.error


def _peak_bytes() -> int:
    """The most memory that this process ever had resident (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _child(task: Task, pipe: Connection) -> None:
    try:
        pipe.send(("result", measure(task, lambda done: pipe.send(("layers", done)))))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def run(task: Task, tell: Callable[[int], None]) -> dict[str, Any]:
    """`measure` in a process of its own, so that its memory is its own too."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, theirs))
    process.start()
    theirs.close()
    try:
        while (message := ours.recv())[0] == "layers":
            tell(message[1])
    except EOFError:
        message = "error", "the process was ended from outside: perhaps there was not enough memory"
    process.join()
    kind, value = message
    if kind == "error":
        raise PrinMixError("a compression failed", where=task.name, found=value)
    return value


def measure_all(tasks: list[Task], shape: Shape, layers: int, console: Console) -> dict[str, Any]:
    """The results of all tasks by name, on a pair with ``layers`` layers that is deleted afterwards."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} layers"),
        TimeElapsedColumn(),
    )
    folder = tasks[0].folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    contenders: dict[str, Any] = {}
    try:
        with Progress(*columns, console=console) as bar:
            line = bar.add_task("generating the pair", total=layers)

            def tell(done: int) -> None:
                bar.update(line, completed=done)

            device = torch.device(tasks[0].device)
            generate_pair(folder, shape, layers, seed=tasks[0].seed, device=device, tell=tell)
            for task in tasks:
                line = bar.add_task(task.name, total=task.layers)
                contenders[task.name] = run(task, tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return contenders


def parse_ratio(text: str) -> Fraction:
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise PrinMixError("not a ratio", where="--ratio", found=text, expected="like 1/16")
    return ratio


def main(
    shape: Annotated[str, Option(help=f"Among {', '.join(SHAPES)}.")] = "qwen2.5-0.5b",
    methods: Annotated[str, Option(help="Comma-separated.")] = ",".join(METHODS),
    ratio: Annotated[str, Option(help="Bytes of the linears / 2 bytes per weight.")] = "1/16",
    layers: Annotated[int, Option(min=0, help="Generated; 0: all, 4 of qwen2.5-7b.")] = 0,
    reference_layers: Annotated[int, Option(min=0, help="Of the straightforward one; 0: leave it out.")] = 1,
    budget_seconds: Annotated[
        float, Option(help="For each method's layers; the first is always done.")
    ] = 600,
    samples: Annotated[int, Option(min=1, help="Calibration samples.")] = 128,
    tokens: Annotated[int, Option(min=1, help="Tokens of each.")] = 256,
    device: Annotated[str, Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")] = "",
    threads: Annotated[int, Option(min=0, help="On the CPU; 0: torch's default.")] = 0,
    seed: Annotated[int, Option(help="Of weights and samples.")] = 0,
    out: Annotated[Path, Option(help="Folder for what is written.")] = Path("build/compression"),
) -> None:
    """Measure and show."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    try:
        chosen = [name.strip() for name in methods.split(",") if name.strip()]
        if not chosen or not set(chosen) <= set(METHODS):
            raise PrinMixError(
                "unknown method", where="--methods", found=methods, expected=", ".join(METHODS)
            )
        if shape not in SHAPES:
            raise PrinMixError("unknown shape", where="--shape", found=shape, expected=", ".join(SHAPES))
        whole = SHAPES[shape].num_hidden_layers
        generated = min(whole, layers or USUAL_LAYERS.get(shape, whole))
        where = pick_device(device)
        threads = threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        tasks = [
            Task(
                method=name,
                straightforward=plain,
                compensated=compensated,
                folder=out / "pair",
                layers=count,
                budget_seconds=math.inf if plain else budget_seconds,
                samples=samples,
                tokens=tokens,
                ratio=parse_ratio(ratio),
                seed=seed,
                device=str(where),
                threads=threads,
            )
            for name in chosen
            for plain, compensated, count in (
                (False, False, generated),
                (True, False, min(reference_layers, generated)),
                (False, True, generated if METHODS[name] else 0),
            )
            if count
        ]
        contenders = measure_all(tasks, SHAPES[shape], generated, console)
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    results: dict[str, Any] = {
        "version": __version__,
        "machine": machine(where),
        "shape": shape,
        "layers": whole,
        "ratio": ratio,
        "samples": samples,
        "tokens": tokens,
        "solver": {"prinmix-paper": "exact", "prinmix-paper, straightforward": solver()},
        "contenders": contenders,
    }
    results["speed_up"] = speed_ups(results)
    write_file(out / "compression.json", json.dumps(results, indent=1).encode() + b"\n")
    write_file(out / "compression.md", markdown(results).encode())
    plot(results, out / "compression.png")
    console.print(table(results))
    console.print(f"Written to {out}: compression.json, compression.png, compression.md.", markup=False)


if __name__ == "__main__":
    typer.run(main)
