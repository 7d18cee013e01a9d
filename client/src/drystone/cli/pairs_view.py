"""Pairs of workers that KV travels between, as a table: each end as it sees itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from drystone.cli.summary import human_bytes

if TYPE_CHECKING:
    from drystone import PairStatus, ProcessStatus

_ARROWS = {"send": "→", "receive": "←"}
_HEADINGS = (
    "pair",
    "over",
    "state",
    "age",
    "moved",
    "chunks",
    "again",
    "on its way",
    "credit",
    "waited",
    "speed",
    "round trip",
    "",
)
_NUMBERS = frozenset(_HEADINGS[3:12])


def pairs_table(processes: tuple[ProcessStatus, ...]) -> Table:
    """One row for each pair of each process."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
    for process in processes:
        for pair in process.pairs:
            table.add_row(*map(Text, _row(process.worker_id, pair)))
    return table


def _row(worker_id: str, pair: PairStatus) -> tuple[str, ...]:
    sends = pair.direction == "send"
    return (
        f"{worker_id} {_ARROWS.get(pair.direction, '?')} {pair.peer}",
        f"{pair.transport}, curve" if pair.curve else pair.transport,
        pair.state,
        f"{pair.age_seconds:.0f} s",
        human_bytes(pair.bytes_total),
        str(pair.chunks_total),
        f"{pair.resent_total} sent" if sends else f"{pair.refused_total} refused",
        human_bytes(pair.outstanding_bytes),
        human_bytes(pair.credit_free_bytes),
        f"{pair.credit_wait_seconds_total:.3f} s" if sends else "",
        f"{human_bytes(pair.bandwidth_bytes_per_second)}/s" if pair.bandwidth_bytes_per_second else "",
        f"{pair.round_trip_seconds * 1e3:.1f} ms" if pair.round_trip_seconds else "",
        _trouble(pair),
    )


def _trouble(pair: PairStatus) -> str:
    fallbacks = f"{pair.fallbacks_total} fallbacks" if pair.fallbacks_total else ""
    return "; ".join(filter(None, (fallbacks, pair.last_error)))
