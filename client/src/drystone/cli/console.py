"""What every command shares: exit codes, the server option, and how errors are told."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, NoReturn

import typer

from drystone import ConnectError, DrystoneError, OverloadedError

SERVER_PACKAGES = ("gateway.__main__", "prefill_worker.__main__", "decode_worker.__main__", "shared.model", "torch")


# A name, an IPv4 address, or an IPv6 address in brackets.
_HOST_PORT = re.compile(r"(?:[^\s:/\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):([0-9]{1,5})", re.ASCII)
_LAST_PORT = 65535


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_INSTALLED = 3
    NO_SERVER = 4
    INTERRUPTED = 130


def say(message: str) -> None:
    """Tells the user something beside the output, on stderr."""
    print(message, file=sys.stderr, flush=True)


def fail(message: str, code: ExitCode = ExitCode.FAILED) -> NoReturn:
    """Says what is wrong and ends the command."""
    say(f"drystone: {message}")
    raise typer.Exit(code)


def _host_and_port(address: str) -> str:
    port = found[1] if (found := _HOST_PORT.fullmatch(address)) else ""
    if not port or not 0 < int(port) <= _LAST_PORT:
        fail(f"{address} is not HOST:PORT", ExitCode.USAGE)
    return address


ServerOption = Annotated[
    str,
    typer.Option(
        "--server",
        "-s",
        envvar="DRYSTONE_SERVER",
        metavar="HOST:PORT",
        help="Gateway to ask.",
        callback=_host_and_port,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


@contextmanager
def telling_errors(server: str, hints: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns the SDK's exceptions into one line and an exit code; `hints` says what to do about a reason."""
    try:
        yield
    except ConnectError as error:
        if error.reason == "NO_SERVER":
            fail(f"no Drystone gateway at {server}; start one with `drystone serve`", ExitCode.NO_SERVER)
        fail(error.message, ExitCode.NO_SERVER)
    except DrystoneError as error:
        hint = (hints or {}).get(error.reason)
        fail(_told(error) + (f"; {hint}" if hint else ""))


def require_server_packages() -> None:
    """Ends the command with a hint unless everything that a server needs can be imported."""
    missing = [name.partition(".")[0] for name in SERVER_PACKAGES if not _installed(name)]
    if missing:
        fail(
            f"this needs the server packages, and {', '.join(dict.fromkeys(missing))} cannot be found; "
            "install them with: pip install 'drystone-server[worker]'",
            ExitCode.NOT_INSTALLED,
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _told(error: DrystoneError) -> str:
    parts = [error.message]
    if error.reason:
        parts.append(f"[{error.reason}]")
    if isinstance(error, OverloadedError) and error.retry_after is not None:
        parts.append(f"(try again in {error.retry_after:.1f} s)")
    if error.request_id:
        parts.append(f"(request {error.request_id})")
    return " ".join(parts)
