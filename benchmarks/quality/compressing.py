"""One pass over a model: every matrix compressed in all the ways that share its calibration samples."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.quality.layers import Activations, Heldout, layer_of, metrics_of
from benchmarks.quality.material import Material
from benchmarks.quality.metrics import output_errors
from benchmarks.quality.settings import Compressor, Setting
from benchmarks.quality.store import Packed, Work, pack
from vllm_prinmix.compress.allocation.budgets import Curve, share
from vllm_prinmix.compress.compensation import Fit, alone, replay
from vllm_prinmix.compress.distillation.student import Student
from vllm_prinmix.compress.distillation.teacher import Teacher
from vllm_prinmix.compress.distillation.train import train
from vllm_prinmix.compress.measure import activation_error
from vllm_prinmix.compress.memory import trim
from vllm_prinmix.compress.metrics import enough
from vllm_prinmix.compress.model import Kind, build_model, is_transposed
from vllm_prinmix.compress.sensitivity import importance, sensitivities
from vllm_prinmix.compress.task import Task, survey
from vllm_prinmix.errors import PrinMixError


@dataclass
class Run:
    """A setting with one calibration seed."""

    setting: Setting
    seed: int
    key: dict[str, Any]
    compressor: Compressor
    work: Work
    limits: dict[str, int] = field(default_factory=dict)  # of matrices that share a budget
    failed: str | None = None  # why there is no result
    seconds: float = 0.0  # of compressing, held-out errors included

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}" if self.setting.draws else str(self.setting)


def compress(
    material: Material,
    runs: Sequence[Run],
    tell: Callable[[str], None],
    advance: Callable[[int], None],
    notes: set[str],
) -> None:
    """Leave in each run's `Work` all matrices that are not there yet; runs share their samples.

    They share one pass too, but for those that compensate, whose inputs depend on what is compressed before.
    A run whose method refuses a matrix is `failed` and goes no further. ``advance`` hears the number of
    weights of each matrix of each run, ``notes`` gets the methods' warnings.
    """
    samples = material.samples(runs[0].setting, runs[0].seed)
    _share(material, runs, samples, tell)
    fitted = [run for run in runs if run.setting.compensates(run.compressor)]
    shared = [run for run in runs if run not in fitted]
    for repeats in sorted({run.compressor.repeats for run in shared}):
        metrics = metrics_of(material, samples, set(material.matrices), tell, repeats)
        alike = [run for run in shared if run.compressor.repeats == repeats]
        _pass(material, alike, alone(metrics), tell, advance, notes)
    for run in fitted:
        _pass(material, [run], _fits(material, run.work, samples, True, tell), tell, advance, notes)
    for run in runs:
        if run.setting.distill and run.failed is None:
            tell(f"{run}: training the scales")
            start = time.monotonic()
            _distill(material, run, samples, tell)
            run.seconds += time.monotonic() - start


def _pass(
    material: Material,
    runs: Sequence[Run],
    fits: Iterator[Fit],
    tell: Callable[[str], None],
    advance: Callable[[int], None],
    notes: set[str],
) -> None:
    """One pass over the model for ``runs``."""
    for fit, activations in with_activations(material, fits):
        name, change = fit.name, material.change(fit.name)
        for run in runs:
            if run.failed is None and name not in run.work:
                tell(f"{run}: {name.removeprefix('model.').removesuffix('.weight')}")
                start = time.monotonic()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        _matrix(material, run, fit, change, activations)
                    except PrinMixError as error:
                        run.failed = f"{name}: {error}"
                run.seconds += time.monotonic() - start
                notes |= {f"{run.setting}: {warning.message}" for warning in caught}
            advance(change.numel())
        del fit, activations  # a layer's last ones would live on while the next layer runs
        trim()


def _fits(
    material: Material,
    work: Work,
    samples: list[torch.Tensor],
    compensated: bool,
    tell: Callable[[str], None],
) -> Iterator[Fit]:
    """What all matrices are fitted to, or were; with compensation it depends on what is in ``work``."""
    return replay(
        material.model,
        material.base,
        material.finetuned,
        samples,
        lambda name: work.load(name)[0] if name in work else None,
        set(material.matrices),
        compensated,
        material.limits.device,
        tell,
    )


def with_activations(material: Material, fits: Iterator[Fit]) -> Iterator[tuple[Fit, Activations | None]]:
    """Each of a layer's linears together with its held-out activations."""
    heldout = Heldout(material)
    activations: dict[str, Activations] = {}
    for fit in fits:
        layer = layer_of(fit.name)
        if layer is not None and fit.name not in activations:
            activations.clear()
            activations |= heldout.layer(layer)
        yield fit, activations.get(fit.name)
        del fit


def _distill(material: Material, run: Run, samples: list[torch.Tensor], tell: Callable[[str], None]) -> None:
    """Train the scales of a run whose matrices are all there, as `prinmix compress --distill` does it.

    The trained ones go to a `Work` of their own: an interrupted run must not train them once more.
    """
    device, model = material.limits.device, material.model
    quantized = {name: run.work.quantized(name) for name in material.matrices}
    exact = {n: material.finetuned.load(n) for n in material.changed if material.is_exact(n)}
    teacher = Teacher(model, material.finetuned, samples, device, tell)
    student = Student(build_model(model.config), material.base, quantized, exact, device)
    trained = train(student, teacher, samples, run.setting.distill, run.seed, lambda text: None).changes
    del teacher, student
    untrained, run.work = run.work, Work(run.work.folder.parents[1], run.key | {"scales": "trained"})
    compensated = run.setting.compensates(run.compressor)
    for name in trained:
        run.work.save(name, pack(trained[name], transposed=False), {})
    for fit, activations in with_activations(material, _fits(material, run.work, samples, compensated, tell)):
        name, packed = fit.name, pack(trained[fit.name], transposed=False)
        change = material.change(name)
        decoded = packed.dense.to(change.device)
        turned = is_transposed(model, name)
        error = activation_error(fit.target(change), decoded, fit.hessian, transposed=turned)
        run.work.save(name, packed, {"calibration": error} | _held_out(change, decoded, activations))
    untrained.remove()


def _share(
    material: Material, runs: Sequence[Run], samples: list[torch.Tensor], tell: Callable[[str], None]
) -> None:
    """The linear layers' limits in the runs that share one budget, as `prinmix compress` does it."""
    sharing = [run for run in runs if run.setting.shares(run.compressor)]
    if not sharing:
        return
    linear = {name for name in material.matrices if material.kinds[name] is Kind.LINEAR}
    samples = enough(samples, max((material.shapes[name][1] for name in linear), default=0))
    curves: dict[str, dict[str, Curve]] = {str(run): {} for run in sharing}
    energy: dict[str, float] = {}
    for name, hessian in metrics_of(material, samples, linear, tell):
        change = material.change(name)
        for run in sharing:
            tell(f"{run}: sharing the budget, {name.removeprefix('model.').removesuffix('.weight')}")
            task = Task(name, run.compressor, material.limit(run.setting, name), transposed=False)  # type: ignore[arg-type]
            found = survey(task, change, hessian)
            curves[str(run)][name], energy[name] = found.curve, found.energy
        del hessian
        trim()
    weights = None
    if samples:
        device = material.limits.device
        weights = importance(sensitivities(material.model, material.finetuned, samples, device, tell), energy)
    for run in sharing:
        total = sum(material.limit(run.setting, name) or 0 for name in linear)
        run.limits = share(curves[str(run)], total, weights if run.setting.budget == "shared" else None)


def _matrix(
    material: Material,
    run: Run,
    fit: Fit,
    change: torch.Tensor,
    activations: Activations | None,
) -> None:
    name, target = fit.name, fit.target(change)
    linear = material.kinds[name] is Kind.LINEAR
    method = run.compressor if linear else run.compressor.for_embedding()
    turned = is_transposed(material.model, name)
    limit = run.limits.get(name, material.limit(run.setting, name))
    compressed, report = method.compress(target.T.contiguous() if turned else target, fit.hessian, limit)
    packed: Packed = pack(compressed, turned)
    figures = {"calibration": float(report["error"])}
    figures |= _held_out(change, packed.dense.to(change.device), activations)
    run.work.save(name, packed, figures)


def _held_out(
    change: torch.Tensor, decoded: torch.Tensor, activations: Activations | None
) -> dict[str, float]:
    if activations is None:
        return {}
    return output_errors(change, decoded, activations.inputs, activations.outliers).asdict()
