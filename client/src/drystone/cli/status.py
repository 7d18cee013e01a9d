"""`drystone status`: the processes of a cluster and their figures."""

import dataclasses
import json
import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drystone import DEFAULT_ADDRESS, Client, ProcessStatus
from drystone.cli.console import JsonOption, ServerOption, telling_errors
from drystone.cli.pairs_view import pairs_table
from drystone.cli.summary import human_bytes

_WIDTH_WHEN_PIPED = 200


def status(server: ServerOption = DEFAULT_ADDRESS, as_json: JsonOption = False) -> None:
    """Shows the gateway and every worker: state, address, model, figures, and the pairs that KV travels between.

    \b
    Examples:
      drystone status
      drystone status --server gpu-1:7700 --json

    \b
    Exit codes: 0 shown, 1 failed, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    with telling_errors(server), Client(server) as client:
        processes = client.status()
    if as_json:
        print(json.dumps({"processes": [_as_dict(process) for process in processes]}, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WHEN_PIPED, highlight=False)
    console.print(_processes(processes))
    if any(process.values for process in processes):
        console.print(_figures(processes))
    if any(process.pairs for process in processes):
        console.print(pairs_table(processes))


def _as_dict(process: ProcessStatus) -> dict[str, object]:
    """A process for machines; the wire has every figure as a float, and counts are integers."""
    values = {
        name: int(value) if value.is_integer() and not _in_seconds(name) else value
        for name, value in process.values.items()
    }
    return {**dataclasses.asdict(process), "values": values}


def _processes(processes: tuple[ProcessStatus, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("process", "role", "state", "address", "model", "version", "up", ""):
        table.add_column(heading)
    for process in processes:
        uptime = f"{process.uptime_seconds:.0f} s"
        row = (process.worker_id, process.role, process.state, process.address, process.model, process.version, uptime)
        table.add_row(*map(Text, row), Text(process.detail))
    return table


def _figures(processes: tuple[ProcessStatus, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure")
    for process in processes:
        table.add_column(Text(process.worker_id), justify="right")
    for name in dict.fromkeys(name for process in processes for name in process.values):
        table.add_row(Text(name), *(_shown(name, process.values.get(name)) for process in processes))
    return table


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.removesuffix("_total").endswith("_bytes"):
        return human_bytes(value)
    return f"{value:.3f}" if _in_seconds(name) else f"{value:.10g}"


def _in_seconds(name: str) -> bool:
    return name.removesuffix("_total").endswith("_seconds")
