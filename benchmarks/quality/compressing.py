"""One pass over a model: every matrix compressed in all the ways that share its calibration samples."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.quality.layers import Activations, Heldout, layer_of, metrics_of, transposed
from benchmarks.quality.material import Material
from benchmarks.quality.metrics import output_errors
from benchmarks.quality.settings import Compressor, Setting
from benchmarks.quality.store import Packed, Work, pack
from vllm_prinmix.compress.allocation.budgets import Curve, share
from vllm_prinmix.compress.memory import trim
from vllm_prinmix.compress.model import Kind
from vllm_prinmix.compress.quantization.hessian import Hessian
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

    A run whose method refuses a matrix is `failed` and goes no further. ``advance`` hears the number of
    weights of each matrix of each run, ``notes`` gets the methods' warnings.
    """
    samples = material.samples(runs[0].setting, runs[0].seed)
    _share(material, runs, samples, tell)
    heldout = Heldout(material)
    activations: dict[str, Activations] = {}
    wanted = set(material.matrices)
    for name, hessian in metrics_of(material, samples, wanted, tell):
        layer = layer_of(name)
        if layer is not None and name not in activations:
            activations.clear()
            activations |= heldout.layer(layer)
        change = material.change(name)
        for run in runs:
            if run.failed is None and name not in run.work:
                tell(f"{run}: {name.removeprefix('model.').removesuffix('.weight')}")
                start = time.monotonic()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        _matrix(material, run, name, change, hessian, activations.get(name))
                    except PrinMixError as error:
                        run.failed = f"{name}: {error}"
                run.seconds += time.monotonic() - start
                notes |= {f"{run.setting}: {warning.message}" for warning in caught}
            advance(change.numel())
        del hessian  # a layer's last one would live on while the next layer runs
        trim()


def _share(
    material: Material, runs: Sequence[Run], samples: list[torch.Tensor], tell: Callable[[str], None]
) -> None:
    """The linear layers' limits in the runs that share one budget, as `prinmix compress` does it."""
    sharing = [run for run in runs if run.setting.shares(run.compressor)]
    if not sharing:
        return
    linear = {name for name in material.matrices if material.kinds[name] is Kind.LINEAR}
    curves: dict[str, dict[str, Curve]] = {str(run): {} for run in sharing}
    for name, hessian in metrics_of(material, samples, linear, tell):
        change = material.change(name)
        for run in sharing:
            tell(f"{run}: sharing the budget, {name.removeprefix('model.').removesuffix('.weight')}")
            task = Task(name, run.compressor, material.limit(run.setting, name), transposed=False)  # type: ignore[arg-type]
            curves[str(run)][name] = survey(task, change, hessian).curve
        del hessian
        trim()
    for run in sharing:
        total = sum(material.limit(run.setting, name) or 0 for name in linear)
        run.limits = share(curves[str(run)], total)


def _matrix(
    material: Material,
    run: Run,
    name: str,
    change: torch.Tensor,
    hessian: Hessian,
    activations: Activations | None,
) -> None:
    linear = material.kinds[name] is Kind.LINEAR
    method = run.compressor if linear else run.compressor.for_embedding()
    turned = transposed(name, material.model)
    limit = run.limits.get(name, material.limit(run.setting, name))
    compressed, report = method.compress(change.T.contiguous() if turned else change, hessian, limit)
    packed: Packed = pack(compressed, turned)
    figures = {"calibration": float(report["error"])}
    if activations is not None:
        decoded = packed.dense.to(change.device)
        figures |= output_errors(change, decoded, activations.inputs, activations.outliers).asdict()
    run.work.save(name, packed, figures)
