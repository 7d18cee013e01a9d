"""Stored blocks for people and for machines."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drystone import BlockInfo
from drystone.cli import ttl as times
from drystone.cli.summary import human_bytes, source_label

SHOWN_DIGITS = 12
_WIDTH_WHEN_PIPED = 200


def print_list(blocks: Iterable[BlockInfo]) -> None:
    """One line for each block."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("key", "tokens", "bytes", "where", "hits", "idle", "pinned", "ttl", "tags", "tenant"):
        table.add_column(heading, justify="right" if heading in {"tokens", "bytes", "hits", "idle", "ttl"} else "left")
    for block in blocks:
        table.add_row(
            f"{block.key[:SHOWN_DIGITS]}…",
            str(block.tokens),
            human_bytes(block.bytes),
            Text(_where(block)),
            str(block.hits),
            times.shown(block.idle_seconds),
            "yes" if block.pinned else "",
            "" if block.ttl_seconds is None else times.shown(block.ttl_seconds),
            Text(", ".join(block.tags)),
            Text(block.tenant),
        )
    _console().print(table)


def _where(block: BlockInfo) -> str:
    """Places, each once, with what they keep the block as."""
    places: dict[str, list[str]] = {}
    for location in block.locations:
        places.setdefault(location.place, []).append(source_label(location.source).removeprefix("prefill "))
    return ", ".join(f"{place} ({', '.join(kept)})" for place, kept in places.items()) or "record only"


def print_block(block: BlockInfo) -> None:
    """One block in full."""
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "key": block.key,
        "tokens": str(block.tokens),
        "bytes": human_bytes(block.bytes),
        "hits": str(block.hits),
        "idle": times.shown(block.idle_seconds),
        "pinned": "yes" if block.pinned else "no",
        "ttl": "none" if block.ttl_seconds is None else times.shown(block.ttl_seconds),
        "tags": ", ".join(block.tags) or "none",
        "tenant": block.tenant or "none",
        "recorded": "yes: the key stays valid without its KV" if block.recorded else "no: the key ends with its KV",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    for location in block.locations:
        place = f"{location.place}, {source_label(location.source)}, {human_bytes(location.bytes)}"
        table.add_row("where", Text(place))
    _console().print(table)


def block_as_dict(block: BlockInfo) -> dict[str, object]:
    """A block for machines."""
    return {**dataclasses.asdict(block), "bytes": block.bytes}


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WHEN_PIPED, highlight=False)
