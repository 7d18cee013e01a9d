"""`drystone check`: served answers against the reference, on this machine."""

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drystone.cli.console import JsonOption, require_server_packages
from drystone.local.options import GateOptions


class CheckedDtype(StrEnum):
    """Types that a check can run in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def check(
    *,
    model: Annotated[str | None, typer.Option(help="As for `drystone serve`. Default: its default model.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to compare.")] = 50,
    questions: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="JSON Lines of prompts to use.")
    ] = None,
    dtype: Annotated[list[CheckedDtype] | None, typer.Option(help="Repeat for more. Default: both.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    full: Annotated[bool, typer.Option("--full", help="Compare full attention too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compares served answers with the reference: plain transformers, one forward, a dense mask.

    Takes roughly 15 s a prompt and type with the default model on two cores: 25 minutes for 50 prompts in both types,
    and half as much again with --full. Fewer --prompts or one --dtype is quicker.

    \b
    Examples:
      drystone check
      drystone check --prompts 4 --dtype float32
      drystone check --model ./Llama-3.2-1B-block-FT --dtype float32 --prompts 10 --full

    \b
    Exit codes: 0 equal, 1 different or failed, 2 wrong usage, 3 server packages not installed.
    """  # noqa: D301 - \b keeps the lines of an example apart
    require_server_packages()
    options = GateOptions(
        model=model,
        prompts=prompts,
        questions=questions,
        dtypes=tuple(dtype or CheckedDtype),
        max_new_tokens=max_new_tokens,
        json=as_json,
        attention=("block", "full") if full else ("block",),
    )
    # Brings torch and transformers.
    gate = importlib.import_module("drystone.local.gate")
    raise typer.Exit(gate.main(options))
