"""`prinmix compress`, second part: the work, module by module, and the finished delta folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from vllm_prinmix import __version__
from vllm_prinmix.compress.measure import weight_error
from vllm_prinmix.compress.memory import trim
from vllm_prinmix.compress.metrics import data_free, hessians
from vllm_prinmix.compress.model import Kind, is_tied
from vllm_prinmix.compress.partial import Partial, disk_errors
from vllm_prinmix.compress.prepare import Job, Options, prepare, progress_bar
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.sidefiles import copy, own
from vllm_prinmix.format.checkpoint import EMBEDDING, FLOATS
from vllm_prinmix.format.delta import write_delta
from vllm_prinmix.format.digest import sample_digest
from vllm_prinmix.format.payload import decode, encode
from vllm_prinmix.format.schema import (
    Base,
    Calibration,
    DeltaConfig,
    Exact,
    Settings,
    Weights,
)
from vllm_prinmix.kernels.quantized import QuantizedFactors


def compress(options: Options, console: Console) -> DeltaConfig:
    """Compress a fine-tune into the delta folder ``options.out``; returns its description.

    An interrupted run leaves finished modules in OUT.partial, where the same command takes them up.
    OUT appears in one step, whole. Raises PrinMixError for bad input and a full disk.
    """
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
            _Run(job, partial, console).all()
            config = _assemble(job, partial)
            partial.publish(options.out, options.overwrite)
        finally:
            partial.close()
    return config


class _Run:
    """The modules of one job that are still to be done."""

    def __init__(self, job: Job, partial: Partial, console: Console) -> None:
        self.job, self.partial, self.console = job, partial, console
        self.progress = progress_bar(console)
        self.pending = [name for name in job.kinds if name not in job.same_bytes and name not in partial]

    def all(self) -> None:
        job, model = self.job, self.job.model
        sizes = {name: job.finetuned.tensors[name].numel for name in self.pending}
        with self.progress:
            self.task = self.progress.add_task("Compressing", total=sum(sizes.values()))
            exact = [name for name in sizes if job.kinds[name] is Kind.EXACT]
            for name in exact:
                self._exact(name)
            wanted = set(sizes) - set(exact)
            if job.samples is None:
                metrics = data_free(model, job.finetuned, wanted, job.device)
            else:
                samples = job.samples.tokens
                metrics = hessians(
                    model, job.finetuned, samples, wanted, job.device, self._tell, job.options.method.repeats
                )
            for name, hessian in metrics:
                self._matrix(name, hessian)
                del hessian  # a layer's last one would live on while the next layer runs
                trim()
            self._tell("Compressed")

    def _tell(self, text: str) -> None:
        self.progress.update(self.task, description=text)

    def _exact(self, name: str) -> None:
        tensor = self.job.finetuned.load(name)
        if not torch.equal(tensor.float(), self.job.base.load(name).float()):
            dtype = FLOATS[self.job.finetuned.tensors[name].dtype]
            self.partial.save(name, Exact(shape=list(tensor.shape), dtype=dtype), tensor)
        self.progress.advance(self.task, tensor.numel())

    def _matrix(self, name: str, hessian: Hessian) -> None:
        """Compress one matrix and keep the result; nothing is stored where the change is zero."""
        self._tell(name.removeprefix("model.").removesuffix(".weight"))
        job = self.job
        dw = job.finetuned.difference(job.base, name).to(job.device)
        if dw.any():
            limit, method = job.limit(name), job.method(name)
            transposed = name == EMBEDDING and not is_tied(job.model)
            with _reported(lambda text: self.console.print(f"{name}: {text}", markup=False)):
                change, report = method.compress(dw.T.contiguous() if transposed else dw, hessian, limit)
            if transposed:
                assert isinstance(change, QuantizedFactors), "see Method.for_embedding"
                change = change.transpose()
            spec, payload = encode(change, report)
            if limit is not None and payload.numel() > limit:
                raise RuntimeError(f"{name}: {payload.numel()} bytes where {limit} were allowed")
            report = report | {"weight_error": weight_error(dw.cpu(), decode(spec, payload).dense())}
            spec = spec.model_copy(update={"report": report})
            self.partial.save(name, spec, payload)
        self.progress.advance(self.task, dw.numel())


@contextmanager
def _reported(say: Callable[[str], None]) -> Iterator[None]:
    """Hands every warning raised inside to ``say`` as one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        say(str(warning.message))


def _assemble(job: Job, partial: Partial) -> DeltaConfig:
    """Write the delta folder, still inside OUT.partial."""
    folder = partial.folder / "delta"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    finished = {name: partial.load(name) for name in job.kinds if name in partial}
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
            embedding_ratio=float(options.embedding_ratio),
        ),
        calibration=_calibration(job),
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
