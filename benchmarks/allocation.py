"""Time the bit allocation: the exact solver beside CVXPY + SCIP, and a whole model's modules.

    python -m benchmarks.allocation
    python -m benchmarks.allocation --sizes 256 --shape tiny

Side by side on the same tables of square modules: Eq. 8 by both solvers, and pairs of widths (the method
prinmix), which SCIP gets only up to --scip-pairs directions. Then all modules of --shape, by both methods, in
--workers processes. The tables are made up (see `Tables`): spectra like those of an LLM's deltas, another one
for every module. Written to --out: allocation.json, allocation.md, allocation.png.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from typer import Option

from benchmarks.allocation_report import markdown, plot
from benchmarks.generate_delta import SHAPES, Shape
from benchmarks.kernels import machine
from benchmarks.layer import sites
from benchmarks.records import write_file
from vllm_prinmix import __version__
from vllm_prinmix.compress.allocation.allocate import Allocation, allocate
from vllm_prinmix.compress.allocation.pairs import choose_pairs
from vllm_prinmix.compress.methods.paper import CANDIDATE_BITS, MAX_ACTIVE_BITS, direction_bytes
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.ratio import budget
from vllm_prinmix.errors import PrinMixError

# Squared error at so many bits, relative to the energy, about that of normal numbers; 7 lies between 6 and 8.
DISTORTION = {0: 1.0, 1: 0.36, 2: 0.119, 3: 0.037, 4: 0.0115, 5: 0.0035, 6: 0.001, 7: 2.6e-4, 8: 6.7e-5}
DECAYS = (0.35, 1.0)  # of singular values: flat and steep
NOISE = 0.2  # standard deviation of the logarithm of each entry
PROBLEMS = ("eq8", "pairs")


@dataclass(frozen=True)
class Tables:
    """A module's errors: sigma_i^2 * DISTORTION[bits] * a lognormal factor, sigma_i = (1 + i/4)^-decay."""

    rows: int
    cols: int
    decay: float
    seed: int

    def errors(self, bits: tuple[int, ...], directions: int, stream: int) -> np.ndarray:
        """float64 [directions, bits]; each ``stream`` has other factors."""
        random = np.random.default_rng((self.seed, stream))
        energy = (1 + np.arange(directions) / 4) ** (-2 * self.decay)
        factors = random.lognormal(0, NOISE, (directions, len(bits)))
        return energy[:, None] * np.array([DISTORTION[b] for b in bits]) * factors

    def solver(self, problem: str, ratio: Fraction) -> Callable[[str], Allocation]:
        """A function from the solver's name to what it chooses; the tables are made here."""
        rows, cols = self.rows, self.cols
        limit = budget(ratio, rows, cols)
        if problem == "eq8":
            errors = self.errors(CANDIDATE_BITS, min(rows, cols), 0)
            cost = [direction_bytes(bits, rows, cols) for bits in CANDIDATE_BITS]
            return lambda solver: allocate(errors, cost, limit, MAX_ACTIVE_BITS, solver)
        method = PrinMix()
        # The method tabulates what the budget can hold at one bit each.
        count = min(rows, cols, limit * 8 // (rows + cols) + 1)
        v, u, (dropped,) = (
            self.errors(method.widths, count, 1),
            self.errors(method.widths, count, 2),
            self.errors((0,), count, 3).T,
        )
        return lambda solver: choose_pairs(
            v, u, dropped, method.widths, rows, cols, limit, method.max_active_bits, solver=solver
        )[1]


def timed(solve: Callable[[str], Allocation], solver: str) -> dict[str, float]:
    start = time.perf_counter()
    found = solve(solver)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "error": found.error, "gap": found.gap}


def compare(
    sizes: list[int], decays: list[float], ratio: Fraction, scip_pairs: int, seed: int
) -> list[Callable[[], dict[str, Any]]]:
    """What is to be measured side by side, a result line each."""

    def measure(problem: str, size: int, decay: float) -> dict[str, Any]:
        solve = Tables(size, size, decay, seed).solver(problem, ratio)
        solvers = ["exact"] if problem == "pairs" and size > scip_pairs else ["exact", "scip"]
        found = {solver: timed(solve, solver) for solver in solvers}
        line: dict[str, Any] = {"problem": problem, "size": size, "decay": decay, **found}
        if "scip" in found:
            exact, scip = found["exact"], found["scip"]
            line["speed_up"] = scip["seconds"] / exact["seconds"]
            line["error_difference"] = exact["error"] / scip["error"] - 1 if scip["error"] else 0.0
        return line

    return [
        lambda case=(problem, size, decay): measure(*case)  # type: ignore[misc]
        for problem in PROBLEMS
        for size in sizes
        for decay in decays
    ]


def modules(shape: Shape, seed: int) -> list[Tables]:
    """Those of a whole model, each with a decay of its own."""
    shapes = [(rows, cols) for parts, cols in sites(shape).values() for rows in parts]
    random = np.random.default_rng(seed)
    return [
        Tables(rows, cols, float(random.uniform(*DECAYS)), seed + 1 + i)
        for i, (rows, cols) in enumerate(shapes * shape.num_hidden_layers)
    ]


def solve_module(tables: Tables, problem: str, ratio: Fraction) -> dict[str, float]:
    """In a worker process."""
    return timed(tables.solver(problem, ratio), "exact")


def whole(
    pool: ProcessPoolExecutor, todo: list[Tables], problem: str, ratio: Fraction, console: Console
) -> dict[str, Any]:
    """Wall-clock seconds for all modules, with the making of their tables, and the solver's of each."""
    start = time.perf_counter()
    found: Iterator[dict[str, float]] = pool.map(solve_module, *_arguments(todo, problem, ratio))
    lines = list(track(found, f"A whole model, {problem}", total=len(todo), console=console))
    wall = time.perf_counter() - start
    seconds = [line["seconds"] for line in lines]
    return {
        "problem": problem,
        "modules": len(todo),
        "wall_seconds": wall,
        "solver_seconds": sum(seconds),
        "median_seconds": float(np.median(seconds)),
        "largest_seconds": max(seconds),
        "largest_gap": max(line["gap"] for line in lines),
    }


def _arguments(tables: list[Tables], problem: str, ratio: Fraction) -> tuple[list[Any], ...]:
    return tables, [problem] * len(tables), [ratio] * len(tables)


def main(
    sizes: Annotated[str, Option(help="Directions of the modules compared, all square.")] = "256,1024,3584",
    decays: Annotated[str, Option(help="Decays of their singular values: a table each.")] = "0.35,0.6,1.0",
    ratio: Annotated[str, Option(help="Bytes of a delta / 2 bytes per weight.")] = "1/16",
    scip_pairs: Annotated[int, Option(help="SCIP gets pairs up to so many directions.")] = 256,
    shape: Annotated[str, Option(help=f"The whole model: {', '.join(SHAPES)}.")] = "qwen2.5-7b",
    workers: Annotated[int, Option(min=1, help="Processes for the whole model.")] = 2,
    seed: Annotated[int, Option(min=0, help="Of the tables.")] = 0,
    out: Annotated[Path, Option(help="Folder for what is written.")] = Path("build/allocation"),
) -> None:
    """Measure and show."""
    console = Console()
    try:
        part, counts, powers = _numbers(ratio, sizes, decays)
        if shape not in SHAPES:
            raise PrinMixError("unknown shape", where="--shape", found=shape, expected=", ".join(SHAPES))
        # Imports and first calls are no part of the time.
        for problem in PROBLEMS:
            for solver in ("exact", "scip"):
                timed(Tables(128, 128, 0.6, seed).solver(problem, part), solver)
        measures = compare(counts, powers, part, scip_pairs, seed)
        lines = [measure() for measure in track(measures, "Side by side", console=console)]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            # The workers' start is no part of the time.
            list(pool.map(solve_module, *_arguments(modules(SHAPES["tiny"], seed), PROBLEMS[0], part)))
            todo = modules(SHAPES[shape], seed)
            totals = [whole(pool, todo, problem, part, console) for problem in PROBLEMS]
    except PrinMixError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    results = {
        "version": __version__,
        "machine": machine(torch.device("cpu")),
        "ratio": ratio,
        "seed": seed,
        "tables": {"distortion": DISTORTION, "noise": NOISE},
        "compared": lines,
        "model": {"shape": shape, "processes": workers, "decays": DECAYS, "methods": totals},
    }
    write_file(out / "allocation.json", json.dumps(results, indent=1).encode() + b"\n")
    text = markdown(results)
    write_file(out / "allocation.md", text.encode())
    plot(results, out / "allocation.png")
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"Written to {out}: allocation.json, allocation.md, allocation.png.", markup=False)


def _numbers(ratio: str, sizes: str, decays: str) -> tuple[Fraction, list[int], list[float]]:
    try:
        found = (
            Fraction(ratio),
            [int(n) for n in sizes.split(",")],
            [float(d) for d in decays.split(",")],
        )
    except (ValueError, ZeroDivisionError) as error:
        raise PrinMixError(
            "not a list of numbers", where="--ratio, --sizes, --decays", found=error, expected="like 256,1024"
        ) from None
    if not 0 < found[0] <= 1 or min(found[1]) < 1 or not all(0 <= d < 9 for d in found[2]):
        raise PrinMixError(
            "a number is out of range",
            where="--ratio, --sizes, --decays",
            expected="a ratio above 0 and up to 1, sizes of 1 or more, decays from 0 to 9",
        )
    return found


if __name__ == "__main__":
    typer.run(main)
