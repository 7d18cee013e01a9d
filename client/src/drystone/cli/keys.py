"""`drystone keys`: CURVE keys of workers, made and shown on this machine."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from drystone.cli.console import ExitCode, JsonOption, fail, say
from drystone.local import keys

_FILE = Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="The worker's key file.")]


def build_app() -> typer.Typer:
    """The command with its commands."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Keys that encrypt KV between workers and say who may exchange it.",
    )
    app.command("new")(new)
    app.command("show")(show)
    return app


def new(
    file: _FILE,
    *,
    name: Annotated[str, typer.Option(help="Name of the worker, for people. Default: the file's.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Makes the keys of one worker: FILE, which only that worker may read, and FILE.pub.

    The line on stdout goes into the files of allowed keys of the workers that it exchanges KV with. Files that exist
    are never written over.

    \b
    Examples:
      drystone keys new /etc/drystone/prefill-0.key
      drystone keys new prefill-0.key --name prefill-0 >> allowed.keys

    \b
    Exit codes: 0 made, 1 failed, 2 wrong usage, 3 server packages not installed.
    """  # noqa: D301 - \b keeps the lines of an example apart
    _require_worker_packages()

    try:
        made = keys.new(file, name or file.stem)
    except keys.KeysError as error:
        fail(str(error))
    say(f"wrote {made.file} (secret, mode 0600) and {made.public_file}")
    _print(made, as_json=as_json)


def show(file: _FILE, *, as_json: JsonOption = False) -> None:
    """Prints a worker's public key and name, as a line for a file of allowed keys. Never the secret.

    \b
    Examples:
      drystone keys show prefill-0.key >> allowed.keys
      drystone keys show prefill-0.key.pub --json

    \b
    Exit codes: 0 shown, 1 failed, 2 wrong usage, 3 server packages not installed.
    """  # noqa: D301 - \b keeps the lines of an example apart
    _require_worker_packages()

    try:
        shown = keys.show(file)
    except keys.KeysError as error:
        fail(str(error))
    _print(shown, as_json=as_json)


def _print(key: keys.ShownKey, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(key.file), "public_key": key.public_key, "name": key.name}, ensure_ascii=False))
    else:
        print(f"{key.public_key} {key.name}".rstrip())


def _require_worker_packages() -> None:
    missing = [name for name in ("shared", "zmq") if importlib.util.find_spec(name) is None]
    if missing:
        fail(
            f"this needs the worker packages, and {' and '.join(missing)} cannot be found; "
            "install them with: pip install 'drystone-server[worker]'",
            ExitCode.NOT_INSTALLED,
        )
