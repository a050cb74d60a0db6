"""`prinmix compress --distill`: what is done between the last matrix and the finished folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from rich.console import Console

from vllm_prinmix.compress.compensation import replay
from vllm_prinmix.compress.distillation.student import Quantized, Student
from vllm_prinmix.compress.distillation.teacher import Teacher
from vllm_prinmix.compress.distillation.train import Distilled, train
from vllm_prinmix.compress.measure import activation_error, weight_error
from vllm_prinmix.compress.model import build_model, is_transposed
from vllm_prinmix.compress.prepare import Job, progress_bar
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.payload import decode, encode
from vllm_prinmix.format.schema import Distillation, Exact, Module

Finished = dict[str, tuple[Module, torch.Tensor]]


def distill(job: Job, finished: Finished, console: Console) -> Distillation:
    """Train the scales of all ``finished`` matrices and replace their payloads and errors in place.

    Raises PrinMixError where the calibration has a single sample: one is held out.
    """
    assert job.samples is not None
    if len(job.samples.tokens) < 2:
        raise PrinMixError(
            "one calibration sample is held out, and nothing is left to train the scales on",
            where=f"--distill {job.options.distill}",
            found=f"{len(job.samples.tokens)} sample in {job.samples.source}",
            expected="at least 2, better 128",
        )
    matrices, exact = {}, {}
    for name, (spec, tensor) in finished.items():
        if isinstance(spec, Exact):
            exact[name] = tensor
        else:
            matrices[name] = decode(spec, tensor)
    with progress_bar(console) as progress:
        task = progress.add_task("Training scales", total=job.options.distill)

        def tell(text: str) -> None:
            progress.update(task, description=f"Training scales, {text}")

        def advance(text: str) -> None:
            tell(text)
            progress.advance(task)

        result = _train(job, matrices, exact, tell, advance)
        if result.steps:
            measuring = progress.add_task("Measuring", total=len(matrices))
            for name, module in _measured(job, result.changes, finished):
                finished[name] = module
                progress.advance(measuring)
    return Distillation(
        steps=job.options.distill, best_step=result.steps, kl_before=result.before, kl_after=result.after
    )


def _train(
    job: Job,
    matrices: dict[str, Quantized],
    exact: dict[str, torch.Tensor],
    tell: Callable[[str], None],
    advance: Callable[[str], None],
) -> Distilled:
    """In a function of its own, so that both models are gone before errors are measured."""
    assert job.samples is not None
    samples = job.samples.tokens
    teacher = Teacher(job.model, job.finetuned, samples, job.device, tell)
    student = Student(build_model(job.model.config), job.base, matrices, exact, job.device)
    return train(student, teacher, samples, job.options.distill, job.options.seed, advance)


def _measured(
    job: Job, changes: dict[str, Quantized], finished: Finished
) -> Iterator[tuple[str, tuple[Module, torch.Tensor]]]:
    """Each matrix encoded, with its errors measured anew."""
    assert job.samples is not None
    fits = replay(
        job.model,
        job.base,
        job.finetuned,
        job.samples.tokens,
        lambda name: changes[name].dense() if name in changes else None,
        set(changes),
        job.compensates,
        job.device,
    )
    for fit in fits:
        name = fit.name
        dw = job.finetuned.difference(job.base, name).to(job.device)
        spec, payload = encode(changes[name])
        decoded = decode(spec, payload).dense().to(job.device)
        turned = is_transposed(job.model, name)
        errors = {
            "weight_error": weight_error(dw, decoded),
            "error": activation_error(fit.target(dw), decoded, fit.hessian, transposed=turned),
        }
        yield name, (spec.model_copy(update={"report": _report(finished[name][0]) | errors}), payload)


def _report(spec: Module) -> dict[str, float | int | str | None]:
    assert not isinstance(spec, Exact)
    return spec.report
