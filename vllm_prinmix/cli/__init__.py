"""The `prinmix` command. What is heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from vllm_prinmix import __version__
from vllm_prinmix.cli import deltas, make
from vllm_prinmix.errors import PrinMixError

app = typer.Typer(
    name="prinmix",
    help="Compress full fine-tunes of one base model into small deltas that vLLM serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    make.compress,
    make.calibration,
    deltas.inspect,
    deltas.verify,
    deltas.merge,
    deltas.report,
):
    app.command()(command)


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
