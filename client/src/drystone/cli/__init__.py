"""The `drystone` command. One file for each of its commands."""

import os
from importlib.metadata import version
from typing import Annotated

import typer

from drystone.cli import ask, blocks, check, demo, keys, serve, status, warm


def build_app() -> typer.Typer:
    """The command with its commands."""
    app = typer.Typer(
        name="drystone",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.command("ask")(ask.ask)
    app.command("warm")(warm.warm)
    app.add_typer(blocks.build_app(), name="blocks")
    app.command("status")(status.status)
    app.command("serve")(serve.serve)
    app.command("check")(check.check)
    app.command("demo")(demo.demo)
    app.add_typer(keys.build_app(), name="keys")
    return app


def main() -> None:
    """Entry point of the `drystone` command."""
    # gRPC's own notes (a server said goodbye) are not the command's output.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    build_app()()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"drystone {version('drystone')}")
        raise typer.Exit


def _options(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Block-attention serving: a document's KV is computed once and laid into any prompt.

    Exit codes: 0 done, 1 failed or different, 2 wrong usage, 3 server packages not installed, 4 no server,
    130 interrupted.
    """
    del show_version  # its callback has acted
