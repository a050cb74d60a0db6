"""`prinmix compress`, first part: what is wrong with the input is found before the work starts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_prinmix import __version__
from vllm_prinmix.compress import account, calibration
from vllm_prinmix.compress.lora import MergedLora, open_finetuned
from vllm_prinmix.compress.methods.base import Method, check_at_least_one
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, read_architecture
from vllm_prinmix.compress.partial import check_out
from vllm_prinmix.compress.ratio import budget, check_reachable
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.digest import combine, tensor_digests
from vllm_prinmix.format.schema import CONFIG_FILE, Budget


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    base: str
    finetuned: str
    out: Path
    calibration: str | None  # calibration.NONE: without data
    method: Method
    ratio: Fraction | None = Fraction(1, 16)  # None only where the method has its own size
    # One budget for all linear layers, where the method can tell what bytes are worth; else one for each.
    budget: Budget = "shared"
    embedding_ratio: Fraction = Fraction(1, 4)
    # Each layer makes up for the errors of those before (`compensation`). None: as the method has it.
    compensate: bool | None = None
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    lora: bool = False  # ``finetuned`` is a PEFT LoRA adapter of the base
    distill: int = 0  # steps of training the scales; 0: they stay as the method chose them
    ray: bool = False  # compress on a Ray cluster; the delta is the same


@dataclass
class Job:
    """Checked input."""

    options: Options
    base: Checkpoint
    finetuned: Checkpoint
    model: Any  # transformers' model, on the meta device
    kinds: dict[str, Kind]  # of every tensor, in the model's order
    shapes: dict[str, tuple[int, ...]]
    samples: calibration.Samples | None  # None: without data
    device: torch.device
    same_bytes: set[str]  # tensors that are bit-identical in both checkpoints
    base_digest: str
    finetuned_digest: str

    def method(self, name: str) -> Method:
        """What one matrix is compressed with."""
        method = self.options.method
        return method if self.kinds[name] is Kind.LINEAR else method.for_embedding()

    @property
    def shares(self) -> bool:
        """Whether the linear layers share one budget."""
        options = self.options
        return options.budget != "module" and options.method.has_curve and options.ratio is not None

    @property
    def budget(self) -> Budget:
        """``options.budget`` as far as it applies."""
        if not self.shares:
            return "module"
        return "even" if self.samples is None else self.options.budget

    @property
    def compensates(self) -> bool:
        """Whether each matrix is fitted to the compressed layers before it."""
        options = self.options
        # What an adapter loses is hardly worth mending, and its few directions would become many.
        default = options.method.compensates and not options.lora
        wanted = default if options.compensate is None else options.compensate
        # Half of the samples tell what to make of the other half.
        return wanted and self.samples is not None and len(self.samples.tokens) > 1

    def limit(self, name: str) -> int | None:
        """The most bytes of one matrix; None: what the method takes."""
        options = self.options
        ratio = options.ratio if self.kinds[name] is Kind.LINEAR else options.embedding_ratio
        rows, cols = self.shapes[name]
        return None if ratio is None else budget(ratio, rows, cols)

    def key(self) -> dict[str, Any]:
        """All that decides the delta's bytes (on one machine): what a resumed run must have in common."""
        return {
            "tool": __version__,
            "base": self.base_digest,
            "finetuned": self.finetuned_digest,
            "calibration": None if self.samples is None else self.samples.sha256,
            "method": self.options.method.name,
            **{name.replace("_", "-"): value for name, value in self.options.method.options().items()},
            "ratio": str(self.options.ratio),
            "budget": self.budget,
            "compensated": self.compensates,
            "distill": self.options.distill,
            "embedding-ratio": str(self.options.embedding_ratio),
            "device": self.device.type,
        }


def prepare(options: Options, console: Console) -> Job:
    """Open and check everything; raises PrinMixError for bad input of every kind."""
    _check_options(options)
    device = pick_device(options.device)
    base = Checkpoint(options.base)
    finetuned = open_finetuned(options.finetuned, base, options.lora)
    if isinstance(finetuned, MergedLora):
        console.print(f"a LoRA adapter, by its config of {finetuned.lora.base or 'no base'}", markup=False)
    base_config, config = read_architecture(base), read_architecture(finetuned)
    account.check_settings(base_config, config, finetuned.folder)
    model = build_model(config)
    expected = expected_tensors(model)
    for checkpoint in (base, finetuned):
        account.check_tensors(checkpoint, expected)
    samples = None
    if options.calibration != calibration.NONE:
        samples = _draw_samples(options, finetuned, base, config.vocab_size, console)
    digests = _read_all([base, finetuned], console)
    same = {
        name
        for name in expected
        if base.tensors[name].dtype == finetuned.tensors[name].dtype and digests[0][name] == digests[1][name]
    }
    if len(same) == len(expected):
        raise PrinMixError(
            "the fine-tune equals the base, bit for bit: there is nothing to compress",
            where=options.finetuned,
            found="all tensors the same",
            fix="give the fine-tuned checkpoint; the base is served under its own name",
        )
    job = Job(
        options=options,
        base=base,
        finetuned=finetuned,
        model=model,
        kinds={name: kind for name, (kind, _) in expected.items()},
        shapes={name: shape for name, (_, shape) in expected.items()},
        samples=samples,
        device=device,
        same_bytes=same,
        base_digest=combine(base, digests[0]),
        finetuned_digest=combine(finetuned, digests[1]),
    )
    if options.compensate and not job.compensates:
        raise PrinMixError(
            "one half of the samples has to bear out what the other says",
            where="--compensate",
            found="1 calibration sample",
            expected="at least 2, better 128",
        )
    _check_ratios(job)
    _warn_of_few_tokens(job, console)
    return job


def _check_options(options: Options) -> None:
    if options.calibration is None:
        raise PrinMixError(
            "calibration text is required: the compression is fitted to what the model reads",
            where="--calibration",
            expected="a .txt file (one sample a line), a .jsonl file (field `text`) or a dataset",
            fix="give --calibration FILE with texts as the fine-tune's users write them; without any, let "
            "the model write them: `prinmix calibration`",
        )
    flag = "--from-lora" if options.lora else "--finetuned"
    inputs = {"--base": options.base, flag: options.finetuned, "--calibration": options.calibration}
    check_out(options.out, options.overwrite, CONFIG_FILE, inputs)
    for name, ratio in (("--ratio", options.ratio), ("--embedding-ratio", options.embedding_ratio)):
        if ratio is not None and not 0 < ratio <= 1:
            raise PrinMixError(
                "a ratio is a fraction of the dense size",
                where=name,
                found=ratio,
                expected="more than 0 and at most 1, such as 1/16 or 0.0625",
            )
    if options.ratio is None and not options.method.has_own_size:
        raise PrinMixError(
            "the method needs a ratio", where=f"--method {options.method}", fix="give --ratio, such as 1/16"
        )
    options.method.check()
    if options.method.repeats and (options.calibration == calibration.NONE or options.ray):
        raise PrinMixError(
            "the method calibrates on layers run again on their own outputs",
            where=f"--method {options.method}",
            found="--ray" if options.ray else f"--calibration {options.calibration}",
            expected="calibration data, and a run without --ray",
            fix="leave out --delta-come-quirk",
        )
    if options.compensate and (options.calibration == calibration.NONE or options.method.repeats):
        raise PrinMixError(
            "layers are fitted to those before them on calibration data, which is run once",
            where="--compensate",
            found="--delta-come-quirk" if options.method.repeats else f"--calibration {options.calibration}",
            fix="leave out --compensate",
        )
    check_at_least_one("--samples", options.samples)
    if options.distill:
        check_at_least_one("--distill", options.distill)
        if options.calibration == calibration.NONE:
            raise PrinMixError(
                "scales are trained on calibration data",
                where=f"--distill {options.distill}",
                found=f"--calibration {options.calibration}",
                fix="give calibration texts, or leave out --distill",
            )
    check_at_least_one("--sequence-length", options.sequence_length)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises PrinMixError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = str(error).splitlines()[0]
        raise PrinMixError("the device cannot be used", where=f"--device {name}", found=found) from error
    return device


def _draw_samples(
    options: Options, finetuned: Checkpoint, base: Checkpoint, vocabulary: int, console: Console
) -> calibration.Samples:
    assert options.calibration is not None
    samples = calibration.draw(
        options.calibration,
        calibration.load_tokenizer(finetuned, base),
        vocabulary,
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    if samples.available < options.samples:
        console.print(
            f"{samples.source} has {samples.available} samples, --samples is {options.samples}: all are used",
            markup=False,
        )
    return samples


def _warn_of_few_tokens(job: Job, console: Console) -> None:
    """With fewer tokens than inputs H is blind to some directions, and what a layer needs is underrated."""
    if not job.shares or job.samples is None:
        return
    inputs, name = max((job.shapes[n][1], n) for n, kind in job.kinds.items() if kind is Kind.LINEAR)
    if job.samples.total < inputs:
        console.print(
            f"calibration has {job.samples.total} tokens, fewer than the {inputs} inputs of {name}: "
            "too few to know what each needs. More samples make a better delta",
            markup=False,
        )


def _read_all(checkpoints: list[Checkpoint], console: Console) -> list[dict[str, str]]:
    """Every tensor's digest, and the check for NaN and infinity, in one pass over all bytes."""
    total = sum(stored.nbytes for c in checkpoints for stored in c.tensors.values())
    with progress_bar(console) as progress:
        task = progress.add_task("Reading and checking both checkpoints", total=total)
        digests = []
        for checkpoint in checkpoints:

            def visit(name: str, chunk: bytes, checkpoint: Checkpoint = checkpoint) -> None:
                account.check_finite(checkpoint, name, chunk)
                progress.advance(task, len(chunk))

            digests.append(tensor_digests(checkpoint, visit))
    return digests


def _check_ratios(job: Job) -> None:
    changed = [
        name for name, kind in job.kinds.items() if kind is not Kind.EXACT and name not in job.same_bytes
    ]
    options = job.options
    for option, ratio, linear in (
        ("--ratio", options.ratio, True),
        ("--embedding-ratio", options.embedding_ratio, False),
    ):
        shapes = {name: job.shapes[name] for name in changed if (job.kinds[name] is Kind.LINEAR) == linear}
        method = options.method if linear else options.method.for_embedding()
        if ratio is not None:
            check_reachable(option, {n: (s[0], s[1]) for n, s in shapes.items()}, ratio, method)


def progress_bar(console: Console) -> Progress:
    """A bar with elapsed and remaining time, estimated over hours: one step may take minutes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=6 * 3600,
    )
