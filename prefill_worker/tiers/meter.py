"""What one tier counts; the process turns it into figures and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _unheard(seconds: float) -> None:
    """Nobody listens."""


@dataclass(slots=True)
class TierMeter:
    """Counters of one tier since it was opened. Written by the tier, and for dropped writes by the block store.

    Attributes:
        hits: Reads that gave a block.
        misses: Reads of what is not there.
        corruptions: Reads that found a bad file.
        failures: Reads that an I/O error or a time limit ended.
        read_bytes: KV bytes of the hits.
        written_bytes: KV bytes of the blocks that were written.
        write_failures: Writes that an I/O error or a time limit ended.
        writes_dropped: Writes that were not begun, because too many bytes waited already.
        evictions: Blocks that went to make room.
        expirations: Blocks that went because nobody had used them for the time to live.
        on_read: Told the seconds of each successful read.
        on_write: Told the seconds of each successful write.
    """

    hits: int = 0
    misses: int = 0
    corruptions: int = 0
    failures: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    write_failures: int = 0
    writes_dropped: int = 0
    evictions: int = 0
    expirations: int = 0
    on_read: Callable[[float], None] = _unheard
    on_write: Callable[[float], None] = _unheard
