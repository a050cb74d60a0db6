"""`prinmix compress`, second part: the work, module by module, and the finished delta folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from rich.console import Console

from vllm_prinmix import __version__
from vllm_prinmix.compress.allocation.budgets import Curve, share
from vllm_prinmix.compress.compensation import Fit, alone, fits
from vllm_prinmix.compress.distillation.finish import distill
from vllm_prinmix.compress.executor import Executor, Serial, Tasks, on_ray
from vllm_prinmix.compress.memory import trim
from vllm_prinmix.compress.metrics import data_free, enough, hessians
from vllm_prinmix.compress.model import Kind, is_transposed
from vllm_prinmix.compress.partial import Partial, disk_errors
from vllm_prinmix.compress.prepare import Job, Options, pick_device, prepare, progress_bar
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.sensitivity import importance, sensitivities
from vllm_prinmix.compress.sidefiles import copy, own
from vllm_prinmix.compress.task import Result, Task, solve, survey
from vllm_prinmix.format.checkpoint import FLOATS
from vllm_prinmix.format.delta import write_delta
from vllm_prinmix.format.digest import sample_digest
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import (
    Base,
    Calibration,
    DeltaConfig,
    Distillation,
    Exact,
    Module,
    Settings,
    Weights,
)


def compress(options: Options, console: Console) -> DeltaConfig:
    """Compress a fine-tune into the delta folder ``options.out``; returns its description.

    An interrupted run leaves finished modules in OUT.partial, where the same command takes them up.
    OUT appears in one step, whole. Raises PrinMixError for bad input and a full disk.
    """
    # A cluster that cannot be used is found out before checkpoints are read.
    with on_ray(pick_device(options.device)) if options.ray else nullcontext(Serial()) as executor:
        return _compress(options, executor, console)


def _compress(options: Options, executor: Executor, console: Console) -> DeltaConfig:
    job = prepare(options, console)
    left = "the modules that are finished are kept and will not be computed again"
    with disk_errors(options.out.with_name(options.out.name + ".partial"), left):
        partial = Partial(options.out, job.key(), options.overwrite)
        if partial.resumed:
            console.print(
                f"{partial.resumed} tensors are taken over from the interrupted run in {partial.folder}",
                markup=False,
            )
        try:
            _Run(job, partial, console).all(executor)
            finished = {name: partial.load(name) for name in job.kinds if name in partial}
            distillation = distill(job, finished, console) if options.distill else None
            config = _assemble(job, partial, finished, distillation)
            partial.publish(options.out, options.overwrite)
        finally:
            partial.close()
    return config


class _Run:
    """The modules of one job that are still to be done."""

    def __init__(self, job: Job, partial: Partial, console: Console) -> None:
        self.job, self.partial, self.console = job, partial, console
        self.progress = progress_bar(console)
        self.limits: dict[str, int] = {}  # bytes, where they are not those of the matrix's own ratio
        self.pending = [name for name in job.kinds if name not in job.same_bytes and name not in partial]

    def all(self, executor: Executor) -> None:
        job = self.job
        sizes = {name: job.finetuned.tensors[name].numel for name in self.pending}
        with self.progress:
            self.task = self.progress.add_task("Compressing", total=sum(sizes.values()))
            exact = [name for name in sizes if job.kinds[name] is Kind.EXACT]
            for name in exact:
                self._exact(name)
            wanted = set(sizes) - set(exact)
            self._share(executor, wanted)
            samples = None if job.samples is None else job.samples.tokens
            for tasks in self._groups(wanted, samples):
                with closing(executor.map(solve, tasks)) as results:
                    for result in results:
                        self._save(result)
            self._tell("Compressed")

    def _tell(self, text: str) -> None:
        self.progress.update(self.task, description=text)

    def _exact(self, name: str) -> None:
        tensor = self.job.finetuned.load(name)
        if not torch.equal(tensor.float(), self.job.base.load(name).float()):
            dtype = FLOATS[self.job.finetuned.tensors[name].dtype]
            self.partial.save(name, Exact(shape=list(tensor.shape), dtype=dtype), tensor)
        self._advance(name)

    def _share(self, executor: Executor, wanted: set[str]) -> None:
        """Choose the linear layers' limits together; an interrupted run's choice is kept."""
        job = self.job
        if not job.shares or not wanted:
            return
        limits = self.partial.limits()
        if limits is None:
            linear = {n for n, kind in job.kinds.items() if kind is Kind.LINEAR and n not in job.same_bytes}
            own = {name: job.limit(name) or 0 for name in linear}
            curves: dict[str, Curve] = {}
            energy: dict[str, float] = {}
            task = self.progress.add_task("Sharing the budget", total=len(linear))
            samples = None
            if job.samples is not None:
                samples = enough(job.samples.tokens, max((job.shapes[name][1] for name in linear), default=0))
            tasks = self._tasks(linear, samples, lambda name: self.progress.advance(task))
            with closing(executor.map(survey, tasks)) as surveys:
                for found in surveys:
                    curves[found.name], energy[found.name] = found.curve, found.energy
                    self.progress.advance(task)
            weights = None
            if samples is not None and job.budget == "shared":
                sensitivity = sensitivities(job.model, job.finetuned, samples, job.device, self._tell)
                weights = importance(sensitivity, energy)
            limits = share(curves, sum(own[name] for name in curves), weights)
            self.partial.save_limits(limits)
        self.limits = limits

    def _groups(self, wanted: set[str], samples: list[torch.Tensor] | None) -> Iterator[Tasks]:
        """The tasks of the matrices ``wanted``; a group's have to be saved before the next is taken."""
        job = self.job
        if not job.compensates:
            yield self._tasks(wanted, samples, self._advance)
            return
        assert samples is not None
        groups = fits(
            job.model, job.base, job.finetuned, samples, wanted, job.device, self._change, self._tell
        )
        for group in groups:
            yield self._each(iter(group), self._advance)
            del group  # large, and not needed while the next ones' inputs are computed
            trim()

    def _tasks(
        self, wanted: set[str], samples: list[torch.Tensor] | None, advance: Callable[[str], None]
    ) -> Tasks:
        """The matrices ``wanted``, as calibration reaches them, each for itself."""
        return self._each(alone(self._metrics(wanted, samples)), advance)

    def _each(self, matrices: Iterator[Fit], advance: Callable[[str], None]) -> Tasks:
        """A task for each matrix that has changed; ``advance`` hears of the others."""
        job = self.job
        for fit in matrices:
            name = fit.name
            for text in fit.warnings:
                self.console.print(f"{name}: {text}", markup=False)
            self._tell(name.removeprefix("model.").removesuffix(".weight"))
            dw = job.finetuned.difference(job.base, name).to(job.device)
            if dw.any():
                limit = self.limits.get(name, job.limit(name))
                task = Task(name, job.method(name), limit, is_transposed(job.model, name))
                yield task, dw, fit.hessian, fit.correction
            else:
                advance(name)
            del dw, fit  # a layer's last ones would live on while the next layer runs
            trim()

    def _change(self, name: str) -> torch.Tensor | None:
        """A finished matrix's dW^, dense; None for an unchanged one."""
        if name not in self.partial:
            return None
        spec, payload = self.partial.load(name)
        assert not isinstance(spec, Exact)
        return decode(spec, payload).dense()

    def _metrics(self, wanted: set[str], samples: list[torch.Tensor] | None) -> Iterator[tuple[str, Hessian]]:
        job = self.job
        if samples is None:
            return data_free(job.model, job.base, job.finetuned, wanted, job.device)
        repeats = job.options.method.repeats
        return hessians(job.model, job.finetuned, samples, wanted, job.device, self._tell, repeats)

    def _save(self, result: Result) -> None:
        for text in result.warnings:
            self.console.print(f"{result.name}: {text}", markup=False)
        self.partial.save(result.name, result.spec, result.payload)
        self._advance(result.name)

    def _advance(self, name: str) -> None:
        self.progress.advance(self.task, self.job.finetuned.tensors[name].numel)


def _assemble(
    job: Job,
    partial: Partial,
    finished: dict[str, tuple[Module, torch.Tensor]],
    distillation: Distillation | None,
) -> DeltaConfig:
    """Write the delta folder, still inside OUT.partial."""
    folder = partial.folder / "delta"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = job.options
    config = DeltaConfig(
        tool=f"vllm-prinmix {__version__}",
        base=Base(
            name=_model_name(options.base),
            content_digest=job.base_digest,
            sample_digest=sample_digest(job.base),
            parameters=sum(stored.numel for stored in job.base.tensors.values()),
        ),
        finetuned=_model_name(options.finetuned),
        settings=Settings(
            method=options.method.name,
            options=options.method.options(),
            ratio=None if options.ratio is None else float(options.ratio),
            budget=job.budget,
            compensated=job.compensates,
            embedding_ratio=float(options.embedding_ratio),
        ),
        calibration=_calibration(job),
        distillation=distillation,
        modules={name: spec for name, (spec, _) in finished.items()},
        unchanged=[name for name in job.kinds if name not in finished],
        weights=Weights(bytes=8, xxh3_128=""),
    )
    config = write_delta(folder, config, {name: tensor for name, (_, tensor) in finished.items()})
    copy(job.finetuned.folder, own(job.finetuned.folder, job.base.folder), folder)
    return config


def _calibration(job: Job) -> Calibration | None:
    if job.samples is None:
        return None
    return Calibration(
        source=job.samples.source,
        sha256=job.samples.sha256,
        samples=len(job.samples.tokens),
        tokens=job.samples.total,
        sequence_length=job.options.sequence_length,
        seed=job.options.seed,
    )


def _model_name(source: str) -> str:
    """A hub id as it is; of a folder its name alone: a delta does not depend on where it was made."""
    return Path(source).resolve().name if Path(source).is_dir() else source
