"""`prinmix verify`: every byte of a delta and its base read, every tensor decoded, errors measured again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from vllm_prinmix.compress.account import check_settings, check_tensors
from vllm_prinmix.compress.calibration import NONE, Samples, draw, load_tokenizer
from vllm_prinmix.compress.compensation import Fit, alone, replay
from vllm_prinmix.compress.lora import open_finetuned
from vllm_prinmix.compress.measure import activation_error, relative_size, weight_error
from vllm_prinmix.compress.merge import check_base
from vllm_prinmix.compress.metrics import data_free
from vllm_prinmix.compress.model import build_model, expected_tensors, is_transposed, read_architecture
from vllm_prinmix.compress.prepare import Options, progress_bar
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import FLOATS, Checkpoint
from vllm_prinmix.format.delta import Delta, check_accounts, read_delta
from vllm_prinmix.format.digest import sample_digest
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import DeltaConfig, Exact

# Errors measured again may differ from the recorded ones by rounding and the order of summation, not by more.
TOLERANCE = 1e-2

Entry = dict[str, Any]


def verify(
    folder: Path,
    base_source: str,
    finetuned_source: str | None,
    calibration: str | None,
    console: Console,
    lora: bool = False,
) -> list[Entry]:
    """Check a delta against its base, and against the fine-tune and its calibration where they are given.

    ``lora``: the fine-tune is a PEFT LoRA adapter.

    Returns one entry per stored tensor: ``name``, ``change`` (||dW^||_F / ||W_base||_F); with a fine-tune
    ``weight_error`` (||dW - dW^||_F^2 / ||dW||_F^2, 0 for an exact tensor); with calibration too ``error``
    (||dW X - dW^ X||^2 / ||dW X||^2, X and dW as they were compressed: see `compensation`), of a delta made
    without data always, in the metric that it was made in.
    Errors are compared with the recorded ones.

    Raises PrinMixError for the first thing that is wrong: a checksum, a digest, a tensor without
    counterpart, a value that is not finite, an exact or unchanged tensor that is not, another error.
    """
    if calibration is not None and finetuned_source is None:
        raise PrinMixError(
            "calibration runs on the fine-tune",
            where="--calibration",
            fix="give --finetuned or --from-lora too",
        )
    delta = read_delta(folder)
    base = Checkpoint(base_source)
    check_accounts(delta.config, base, delta.folder)
    check_base(base, delta, console)
    if sample_digest(base) != delta.config.base.sample_digest:
        raise PrinMixError("the recorded sample digest is not the base's", where=folder, fix="compress again")
    finetuned = None if finetuned_source is None else open_finetuned(finetuned_source, base, lora)
    model = None if finetuned is None else _check_finetuned(finetuned, base)
    entries: dict[str, Entry] = {}
    with progress_bar(console) as progress:
        names = [*delta.config.modules, *(delta.config.unchanged if finetuned else [])]
        task = progress.add_task("Decoding", total=sum(base.tensors[name].numel for name in names))
        for name in names:
            if (entry := _check_tensor(delta, base, finetuned, name)) is not None:
                entries[name] = entry
            progress.advance(task, base.tensors[name].numel)
    if finetuned is not None and (calibration is not None or delta.config.calibration is None):
        _check_errors(delta, base, finetuned, model, calibration or NONE, entries, console)
    return list(entries.values())


def _check_finetuned(finetuned: Checkpoint, base: Checkpoint) -> Any:
    """The fine-tune's model (on the meta device), when the two checkpoints fit each other."""
    config = read_architecture(finetuned)
    check_settings(read_architecture(base), config, finetuned.folder)
    model = build_model(config)
    check_tensors(finetuned, expected_tensors(model))
    return model


def _check_tensor(delta: Delta, base: Checkpoint, finetuned: Checkpoint | None, name: str) -> Entry | None:
    """Check one tensor; None for one that is unchanged."""
    spec = delta.config.modules.get(name)
    if spec is None:
        assert finetuned is not None
        if not torch.equal(base.load(name).float(), finetuned.load(name).float()):
            raise _wrong(delta, name, "is called unchanged, but base and fine-tune differ")
        return None
    weight = base.load(name, torch.float32)
    if isinstance(spec, Exact):
        stored = delta.tensors[name]
        if finetuned is not None and not (
            FLOATS[finetuned.tensors[name].dtype] == spec.dtype and torch.equal(stored, finetuned.load(name))
        ):
            raise _wrong(delta, name, "is not the fine-tune's tensor")
        entry: Entry = {"name": name, "change": relative_size(stored.float() - weight, weight)}
        return entry if finetuned is None else entry | {"weight_error": 0.0}
    change = decode(spec, delta.tensors[name]).dense()
    if not torch.isfinite(change).all():
        raise _wrong(delta, name, "decodes to NaN or infinite values")
    entry = {"name": name, "change": relative_size(change, weight)}
    if finetuned is not None:
        entry["weight_error"] = weight_error(finetuned.difference(base, name), change)
        _compare(delta, name, spec.report.get("weight_error"), entry["weight_error"])
    return entry


def _check_errors(
    delta: Delta,
    base: Checkpoint,
    finetuned: Checkpoint,
    model: Any,
    source: str,
    entries: dict[str, Entry],
    console: Console,
) -> None:
    """Measure every matrix's error in the metric of ``source``: calibration run as it was run, or no data."""
    recorded, modules = delta.config.calibration, delta.config.modules
    wanted = {name for name, spec in modules.items() if not isinstance(spec, Exact)}
    cpu = torch.device("cpu")

    def change(name: str) -> torch.Tensor | None:
        spec = modules.get(name)
        return None if spec is None or isinstance(spec, Exact) else decode(spec, delta.tensors[name]).dense()

    fits: Iterator[Fit]
    if source == NONE:
        same = recorded is None
        metrics = data_free(model, base, finetuned, wanted, cpu)
        fits = alone(metrics)
    else:
        samples = draw_again(delta.config, source, finetuned, base, model.config.vocab_size)
        same = recorded is not None and samples.sha256 == recorded.sha256
        compensated = delta.config.settings.compensated
        fits = replay(model, base, finetuned, samples.tokens, change, wanted, compensated, cpu)
    if not same:
        console.print(
            f"{source} gives other inputs than the delta was made for: errors are not compared",
            markup=False,
        )
    with progress_bar(console) as progress:
        task = progress.add_task("Measuring", total=len(wanted))
        for fit in fits:
            name, spec = fit.name, modules[fit.name]
            assert not isinstance(spec, Exact)
            target, decoded = fit.target(finetuned.difference(base, name)), change(name)
            assert decoded is not None
            turned = is_transposed(model, name)
            entries[name]["error"] = activation_error(target, decoded, fit.hessian, transposed=turned)
            del fit, target, decoded
            if same:
                _compare(delta, name, spec.report.get("error"), entries[name]["error"])
            progress.advance(task)


def draw_again(
    config: DeltaConfig, source: str, finetuned: Checkpoint, base: Checkpoint, vocabulary: int
) -> Samples:
    """Samples of ``source`` as the delta's were drawn; for one made without data, by the default settings."""
    drawn = config.calibration or Options
    return draw(
        source,
        load_tokenizer(finetuned, base),
        vocabulary,
        samples=drawn.samples,
        sequence_length=drawn.sequence_length,
        seed=drawn.seed,
    )


def _compare(delta: Delta, name: str, recorded: Any, measured: float) -> None:
    if recorded is not None and not math.isclose(recorded, measured, rel_tol=TOLERANCE):
        raise _wrong(delta, name, f"has error {measured:.6g}, recorded is {recorded:.6g}")


def _wrong(delta: Delta, name: str, what: str) -> PrinMixError:
    return PrinMixError(f"{name} {what}", where=delta.folder, fix="compress the fine-tune again")


def show(entries: list[Entry], console: Console) -> None:
    """One row per stored tensor; the errors that were measured."""
    columns = {"change": "size of the change / base", "weight_error": "error of weights", "error": "error"}
    shown = [key for key in columns if any(key in entry for entry in entries)]
    table = Table(Column("tensor", no_wrap=True), *(columns[key] for key in shown))
    for entry in entries:
        name = entry["name"].removeprefix("model.").removesuffix(".weight")
        table.add_row(name, *(f"{entry[key]:.3g}" if key in entry else "" for key in shown))
    console.print(table)
