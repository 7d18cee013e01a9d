"""`drystone serve`: a gateway with its workers on this machine."""

import os
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from drystone.cli.console import ExitCode, fail, require_server_packages, say
from drystone.local.options import ServeOptions
from drystone.local.supervisor import StopRequested, Supervisor, SupervisorError


class Dtype(StrEnum):
    """Types of the served weights and KV."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class LogLevel(StrEnum):
    """Least level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    *,
    model: Annotated[
        str,
        typer.Option(
            envvar="DRYSTONE_MODEL", help="Local folder, GGUF file, hub id, or 'default' (SmolLM2-135M-Instruct)."
        ),
    ] = "default",
    dtype: Annotated[Dtype, typer.Option(envvar="DRYSTONE_DTYPE", help="Type of weights and KV.")] = Dtype.AUTO,
    prefill: Annotated[int, typer.Option(min=0, envvar="DRYSTONE_PREFILL", help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, envvar="DRYSTONE_DECODE", help="Decode workers.")] = 1,
    host: Annotated[
        str, typer.Option(envvar="DRYSTONE_HOST", help="Address that the gateway serves on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar="DRYSTONE_PORT", help="Its port; 0 takes a free one.")
    ] = 7700,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, envvar="DRYSTONE_THREADS", help="torch threads of each worker. Default: an even share of the cores."
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            envvar="DRYSTONE_STORE",
            file_okay=False,
            help="Folder in which blocks are kept over restarts, tokens of documents among them. Default: none.",
        ),
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(envvar="DRYSTONE_LOG_LEVEL", help="Least level that is logged.")
    ] = LogLevel.INFO,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log JSON, one object a line.")] = False,
) -> None:
    """Runs a gateway with its workers on this machine until Ctrl-C.

    One line on stdout, beginning with "ready:", says when requests are taken; logs go to stderr. A second
    Ctrl-C kills at once. If a process dies, all are stopped. Other DRYSTONE_* variables reach the processes.

    \b
    Examples:
      drystone serve
      drystone serve --store ~/.local/share/drystone
      drystone serve --model ./Llama-3.2-1B-block-FT --dtype bfloat16 --prefill 2

    \b
    Exit codes: 0 stopped on request, 1 a process failed, 2 wrong usage, 3 server packages not installed.
    """  # noqa: D301 - \b keeps the lines of an example apart
    if os.environ.get("DRYSTONE_CONFIG"):
        fail(
            "DRYSTONE_CONFIG: one file is of one process; use environment variables, or start processes alone",
            ExitCode.USAGE,
        )
    require_server_packages()
    options = ServeOptions(
        model=model,
        dtype=dtype,
        prefill=prefill,
        decode=decode,
        host=host,
        port=port,
        threads=threads,
        log_level=log_level,
        json_logs=json_logs,
        store=store.absolute() if store is not None else None,
    )
    try:
        _run(Supervisor(options, report=say))
    except SupervisorError as error:
        fail(str(error), ExitCode.FAILED)


def _run(supervisor: Supervisor) -> None:
    # Before there are children Ctrl-C may end the command as it is; from here on it only asks.
    supervisor.prepare()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        supervisor.request_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        with supervisor:
            print(f"ready: http2 gRPC gateway at {supervisor.address} ({supervisor.description})", flush=True)
            supervisor.wait()
    except StopRequested:
        say("stopped before it was ready")
