"""Commands on finished deltas: inspect, verify, merge, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_prinmix.cli.options import BaseOption, DeltaArgument, LoraOption, one_source
from vllm_prinmix.errors import PrinMixError


def inspect(
    delta: DeltaArgument, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Show what a delta holds: ratios, bit classes and errors of every module."""
    from vllm_prinmix.compress import inspection

    description = inspection.describe(delta)
    if as_json:
        typer.echo(json.dumps(description, indent=1))
    else:
        inspection.show(description, Console())


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

    source = one_source(finetuned, from_lora) if finetuned or from_lora else None
    entries = module.verify(
        delta, base, source, calibration, Console(stderr=True), lora=from_lora is not None
    )
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
    else:
        module.show(entries, Console())
        typer.echo(f"{delta}: all is well, {len(entries)} tensors checked")


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

    if html is not None and html.suffix not in (".html", ".htm"):
        raise PrinMixError(
            "a page is written over what is there, so its name has to say that it is one",
            where=f"--html {html}",
            expected="a name that ends in .html",
        )
    console = Console(stderr=True)
    collected = module_.collect(delta, console)
    given = {"--base": base, "--finetuned": finetuned or from_lora, "--calibration": calibration}
    if any(given.values()) or module is not None:
        if missing := [option for option, value in given.items() if value is None]:
            raise PrinMixError(
                "Eq. 5's terms need the two models and data", where="report", found=f"no {', '.join(missing)}"
            )
        from vllm_prinmix.compress.report_terms import terms

        source = one_source(finetuned, from_lora)
        collected["terms"] = terms(
            delta, base or "", source, calibration or "", module, console, lora=from_lora is not None
        )
    if html is None:
        module_.show(collected, Console())
        return
    from vllm_prinmix.compress.partial import disk_errors
    from vllm_prinmix.compress.report_page import page

    with disk_errors(html, "nothing was written"):
        html.write_text(page(collected), encoding="utf-8")
    typer.echo(f"{html}: written")
