"""`prinmix compress`, and `prinmix calibration` for the texts that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_prinmix.cli.options import BaseOption, LoraOption, fraction, one_source, sharing, widths


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
            help="shared: the linear layers keep to the ratio together; those whose errors matter more to "
            "the predictions get more bytes (method prinmix). even: together, by relative errors alone, as "
            "without data. module: each keeps to it, as in the paper."
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
    compensate: Annotated[
        bool | None,
        typer.Option(
            help="Fit each layer to what the compressed layers before it give it, so that it makes up for "
            "their errors; takes more forward passes. Default: for prinmix with calibration data, but not of "
            "adapters."
        ),
    ] = None,
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
        bits=None if bits is None else widths(bits),
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
        finetuned=one_source(finetuned, from_lora),
        lora=from_lora is not None,
        out=out,
        calibration=calibration,
        method=chosen,
        ratio=None if ratio is None else fraction("--ratio", ratio),
        budget=sharing(budget),
        embedding_ratio=fraction("--embedding-ratio", embedding_ratio),
        compensate=compensate,
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


def calibration(
    finetuned: Annotated[str, typer.Option(help="The fine-tuned model: a checkpoint folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, for `compress --calibration`.")],
    samples: Annotated[int, typer.Option(help="Texts.")] = 128,
    tokens: Annotated[int, typer.Option(help="At most, of a question and of an answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    device: Annotated[str, typer.Option(help="auto: cuda where there is one, else cpu.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Let a fine-tune write calibration texts itself, where there are none of its users'."""
    from transformers.utils import logging

    from vllm_prinmix.compress.generation import write_calibration
    from vllm_prinmix.compress.prepare import progress_bar

    logging.disable_progress_bar()  # its bar would tear ours
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("Writing", total=samples)
        written = write_calibration(
            finetuned,
            out,
            samples=samples,
            tokens=tokens,
            seed=seed,
            device=device,
            overwrite=overwrite,
            advance=lambda count: progress.advance(task, count),
        )
    typer.echo(f"{out}: {samples} texts, {written.tokens} tokens. Look at them before you rely on them.")
    if written.unfinished:
        typer.echo(
            f"{written.unfinished} of them had not ended after --tokens {tokens}: answers are longer, or the "
            "model repeats itself, and then texts from elsewhere calibrate better."
        )
