"""All runs that tables of a pair need: those that are not in the store are compressed and scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality.compressing import Run, compress
from benchmarks.quality.material import Limits, Material
from benchmarks.quality.pairs import Pair
from benchmarks.quality.scoring import Scorer
from benchmarks.quality.settings import Setting, code_digest
from benchmarks.quality.store import Store, Work
from vllm_prinmix.compress.prepare import progress_bar


@dataclass
class Results:
    """Of one pair: each setting's results, one per seed; why others have none; what methods warned of."""

    found: dict[Setting, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[Setting, str] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    layers: int = 0


def measure(
    pair: Pair,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    limits: Limits,
    out: Path,
    console: Console,
) -> Results:
    """The results of ``settings``, taken from OUT/results.jsonl where they are there."""
    results = Results()
    for lora in (False, True):
        chosen = [s for s in settings if s.lora is lora]
        if chosen:
            _measure(pair.of_lora() if lora else pair, chosen, seeds, limits, out, console, results)
    return results


def _measure(
    pair: Pair,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    limits: Limits,
    out: Path,
    console: Console,
    results: Results,
) -> None:
    store, material, code = Store(out), Material(pair, limits), code_digest()
    results.layers = material.model.config.num_hidden_layers
    wanted: list[Run] = []
    for setting in settings:
        compressor = setting.compressor()
        if reason := material.unreachable(setting, compressor):
            results.skipped[setting] = reason
            continue
        for seed in seeds if setting.draws else seeds[:1]:
            key = material.key(setting, seed, code)
            wanted.append(Run(setting, seed, key, compressor, Work(out, key)))
    pending = {run.work.folder: run for run in wanted if store.get(run.key) is None}
    done = len({run.work.folder for run in wanted}) - len(pending)
    if pending and done:
        console.print(f"{pair.name}: {done} results are there, {len(pending)} are to be made", markup=False)
    _run(pair, material, list(pending.values()), store, console, results)
    for run in wanted:
        failed = pending[run.work.folder].failed if run.work.folder in pending else None
        if failed:
            results.skipped[run.setting] = failed
            continue
        result = store.get(run.key)
        assert result is not None
        results.found.setdefault(run.setting, []).append(result)


def _run(
    pair: Pair, material: Material, pending: list[Run], store: Store, console: Console, results: Results
) -> None:
    """One pass over the model for each set of calibration samples; every run is scored and stored."""
    if not pending:
        return
    passes: dict[str, list[Run]] = {}
    for run in pending:
        passes.setdefault(run.key["calibration"], []).append(run)
    weights = sum(_numel(material.shapes[name]) for name in material.matrices)
    with progress_bar(console) as progress:
        task = progress.add_task(pair.name, total=weights * len(pending))
        scored = progress.add_task("Scored", total=len(pending))

        def tell(text: str) -> None:
            progress.update(task, description=f"{pair.name}: {text}")

        tell("predictions of the fine-tuned model")
        scorer = Scorer(material)
        for runs in passes.values():
            compress(
                material,
                runs,
                tell,
                lambda weights: progress.advance(task, weights),
                results.notes,
            )
            for run in runs:
                if run.failed is None:
                    tell(f"{run}: exact match and KL")
                    start = time.monotonic()
                    result = scorer.score(run) | {"seed": run.seed, "compress_seconds": run.seconds}
                    store.add(run.key, result | {"score_seconds": time.monotonic() - start})
                run.work.remove()
                progress.advance(scored)


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1]
