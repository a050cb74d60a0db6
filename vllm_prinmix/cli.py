"""The `prinmix` command. What is heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_prinmix import __version__
from vllm_prinmix.errors import PrinMixError

app = typer.Typer(
    name="prinmix",
    help="Compress full fine-tunes of one base model into small deltas that vLLM serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BaseOption = Annotated[
    str, typer.Option("--base", help="The base model: a checkpoint folder or a cached hub id.")
]
LoraOption = Annotated[
    str | None, typer.Option(help="In place of --finetuned: a PEFT LoRA adapter of the base.")
]
DeltaArgument = Annotated[Path, typer.Argument(help="A delta folder.")]


def main() -> None:
    """The console script: an error is one message on stderr and exit code 1.

    What is no PrinMixError is a bug of this program or trouble with a file: its traceback is shown with
    PRINMIX_DEBUG=1.
    """
    try:
        app()
    except PrinMixError as error:
        _fail(str(error))
    except Exception as error:
        if os.environ.get("PRINMIX_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (PRINMIX_DEBUG=1 shows where)")


def _fail(message: str) -> None:
    console = Console(stderr=True)
    console.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"prinmix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    base: BaseOption,
    out: Annotated[Path, typer.Option(help="The delta folder to make.")],
    finetuned: Annotated[
        str | None, typer.Option(help="The fine-tuned model: a checkpoint folder or a cached hub id.")
    ] = None,
    from_lora: LoraOption = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Required. Texts as the fine-tune's users write them: .txt (one sample a line), .jsonl "
            "(field `text`), a folder of these, or a Hugging Face dataset. none: without data, at a loss of "
            "quality."
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            help="Upper limit: bytes of the linear layers / 2 bytes per weight. Default: 1/16, or what the "
            "method takes where its size is fixed."
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="shared: the linear layers keep to the ratio together, those that need more bytes get more "
            "(method prinmix). module: each keeps to it, as in the paper."
        ),
    ] = "shared",
    embedding_ratio: Annotated[str, typer.Option(help="The same for embedding and lm_head.")] = "1/4",
    method: Annotated[
        str,
        typer.Option(
            help="prinmix, prinmix-paper (Algorithm 1 of the paper), or a baseline: delta-come, bitdelta, "
            "low-rank, gptq, deltazip, gpt-zip."
        ),
    ] = "prinmix",
    bits: Annotated[
        str | None,
        typer.Option(help="Candidate bit-widths; gptq, deltazip: the one width. Default: the method's."),
    ] = None,
    max_active_bits: Annotated[
        int | None,
        typer.Option(help="At most this many different widths (prinmix: pairs of V's and U's) per module."),
    ] = None,
    rank_penalty: Annotated[
        float | None,
        typer.Option(
            help="Prefer fewer directions with more bits (faster prefill): what each has to be worth, in "
            "mean errors per direction."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples, drawn without replacement.")] = 128,
    sequence_length: Annotated[
        int, typer.Option(help="Longer samples give a random window of this length.")
    ] = 2048,
    solver: Annotated[
        str | None, typer.Option(help="prinmix-paper: of the bit allocation (Eq. 8), scip or exact.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A step of the method that is left out; may be repeated.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="bitdelta: mean (of |dW|) or fitted (to the calibration data).")
    ] = None,
    delta_come_quirk: Annotated[
        bool,
        typer.Option("--delta-come-quirk", help="delta-come: calibrate as its published program does."),
    ] = False,
    distill: Annotated[
        int,
        typer.Option(
            help="Afterwards train all scales for so many steps, so that the model as a whole predicts what "
            "the fine-tune does: no more bytes. 150 are enough. The whole model is in memory, in float32."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of samples and windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto: cuda where there is one, else cpu.")] = "auto",
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Compress on a running Ray cluster (RAY_ADDRESS, or this machine's)."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output where it exists.")
    ] = False,
) -> None:
    """Compress a fine-tune into a delta. Interrupted, the same command goes on where it stopped."""
    from vllm_prinmix.compress import inspection
    from vllm_prinmix.compress.methods import registry
    from vllm_prinmix.compress.prepare import Options
    from vllm_prinmix.compress.run import compress as run

    chosen = registry.make(
        method,
        bits=None if bits is None else _bits(bits),
        max_active_bits=max_active_bits,
        rank_penalty=rank_penalty,
        solver=solver,
        scale=scale,
        delta_come_quirk=delta_come_quirk or None,
        **registry.without(method, without or []),
    )
    if ratio is None and not chosen.has_own_size:
        ratio = "1/16"
    options = Options(
        base=base,
        finetuned=_one_source(finetuned, from_lora),
        lora=from_lora is not None,
        out=out,
        calibration=calibration,
        method=chosen,
        ratio=None if ratio is None else _fraction("--ratio", ratio),
        shared_budget=_shared(budget),
        embedding_ratio=_fraction("--embedding-ratio", embedding_ratio),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        overwrite=overwrite,
        distill=distill,
        ray=ray,
    )
    console = Console(stderr=True)
    try:
        run(options, console)
    except KeyboardInterrupt:
        console.print(
            "interrupted; the same command goes on from the modules that are finished", style="bold"
        )
        raise typer.Exit(130) from None
    inspection.show(inspection.describe(out), Console())


@app.command("calibration")
def calibration_(
    finetuned: Annotated[str, typer.Option(help="The fine-tuned model: a checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, for `compress --calibration`.")],
    samples: Annotated[int, typer.Option(help="Texts.")] = 128,
    tokens: Annotated[int, typer.Option(help="At most, of a question and of an answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    device: Annotated[str, typer.Option(help="auto: cuda where there is one, else cpu.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Let a fine-tune write calibration texts itself, where there are none of its users'."""
    from vllm_prinmix.compress.generation import write_calibration
    from vllm_prinmix.compress.prepare import progress_bar

    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("Writing", total=samples)
        total = write_calibration(
            finetuned,
            out,
            samples=samples,
            tokens=tokens,
            seed=seed,
            device=device,
            overwrite=overwrite,
            advance=lambda count: progress.advance(task, count),
        )
    typer.echo(f"{out}: {samples} texts, {total} tokens. Have a look at them before you rely on them.")


@app.command("inspect")
def inspect_(
    delta: DeltaArgument, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Show what a delta holds: ratios, bit classes and errors of every module."""
    from vllm_prinmix.compress import inspection

    description = inspection.describe(delta)
    if as_json:
        typer.echo(json.dumps(description, indent=1))
    else:
        inspection.show(description, Console())


@app.command()
def verify(
    delta: DeltaArgument,
    base: BaseOption,
    finetuned: Annotated[str | None, typer.Option(help="Measure the errors against it again.")] = None,
    from_lora: LoraOption = None,
    calibration: Annotated[
        str | None, typer.Option(help="With one of these: measure the errors on its inputs too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Check all bytes of a delta and its base, decode every tensor, measure errors again."""
    from vllm_prinmix.compress import verify as module

    source = _one_source(finetuned, from_lora) if finetuned or from_lora else None
    entries = module.verify(
        delta, base, source, calibration, Console(stderr=True), lora=from_lora is not None
    )
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
    else:
        module.show(entries, Console())
        typer.echo(f"{delta}: all is well, {len(entries)} tensors checked")


@app.command()
def merge(
    base: BaseOption,
    delta: Annotated[Path, typer.Option(help="A delta folder.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output where it exists.")
    ] = False,
) -> None:
    """Write base + delta as an ordinary Hugging Face checkpoint."""
    dtypes = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in dtypes:
        raise PrinMixError("unknown dtype", where="--dtype", found=dtype, expected=", ".join(dtypes))
    from vllm_prinmix.compress.merge import merge as run

    run(base, delta, out, dtype, overwrite, Console(stderr=True))


@app.command()
def report(
    delta: DeltaArgument,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts to this file.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="With the next two: the terms of Eq. 5 (the paper's Figure 2) of one module."),
    ] = None,
    finetuned: Annotated[str | None, typer.Option(help="The fine-tuned model.")] = None,
    from_lora: LoraOption = None,
    calibration: Annotated[str | None, typer.Option(help="Calibration texts, or none.")] = None,
    module: Annotated[
        str | None, typer.Option(help="Of Eq. 5's terms; default: q_proj of the last layer.")
    ] = None,
) -> None:
    """Show what a delta spends its bytes on: bits by layer and type, errors, singular values."""
    from vllm_prinmix.compress import report as module_

    console = Console(stderr=True)
    collected = module_.collect(delta, console)
    given = {"--base": base, "--finetuned": finetuned or from_lora, "--calibration": calibration}
    if any(given.values()) or module is not None:
        if missing := [option for option, value in given.items() if value is None]:
            raise PrinMixError(
                "Eq. 5's terms need the two models and data", where="report", found=f"no {', '.join(missing)}"
            )
        from vllm_prinmix.compress.report_terms import terms

        source = _one_source(finetuned, from_lora)
        collected["terms"] = terms(
            delta, base or "", source, calibration or "", module, console, lora=from_lora is not None
        )
    if html is None:
        module_.show(collected, Console())
        return
    from vllm_prinmix.compress.report_page import page

    html.write_text(page(collected), encoding="utf-8")
    typer.echo(f"{html}: written")


def _one_source(finetuned: str | None, from_lora: str | None) -> str:
    """The fine-tune, given in one of two ways."""
    if (finetuned is None) == (from_lora is None):
        raise PrinMixError(
            "the fine-tune is needed, once",
            where="--finetuned, --from-lora",
            found="neither" if finetuned is None else "both",
            expected="--finetuned CHECKPOINT, or --from-lora ADAPTER",
        )
    return finetuned or from_lora or ""


def _fraction(option: str, text: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise PrinMixError(
            "the ratio is not a number",
            where=option,
            found=text,
            expected="a fraction such as 1/16 or 0.0625",
        ) from None


def _shared(budget: str) -> bool:
    if budget not in ("shared", "module"):
        raise PrinMixError("unknown budget", where="--budget", found=budget, expected="shared or module")
    return budget == "shared"


def _bits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PrinMixError(
            "the bit-widths cannot be read", where="--bits", found=text, expected="numbers such as 0,2,3,4"
        ) from None
