"""The cases: goodput and latency in turns with the peers, several pairs at once, a receiver that stands still."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.load.transport_pair import Pair, Round, pairs
from tests.load.transport_process import WAYS
from tests.load.transport_sides import SHAPE, Sent, Transport

OURS, BARE, PLAIN = "drystone", "pyzmq and memcpy", "plain socket"
# 14 MiB; four are under way at once, as a prefill worker has them.
BLOCK_TOKENS, BLOCKS, AT_ONCE = 100, 32, 4
# 7 tokens are 1,032,192 bytes: the most that is at most 1 MiB.
SMALL_TOKENS, SMALL_BLOCKS = 7, 200
STALLED_TOKENS, STALLED_BLOCKS, STALLED_SECONDS = 28, 200, 3.0
_LEAST_ROUNDS = 5
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Args:
        seconds: Of a case, its starts not counted; what must be done is done all the same.
        rounds: Least number of rounds.
        blocks: Blocks of a round, where not the case's own.
    """

    seconds: float
    rounds: int = _LEAST_ROUNDS
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Stalled:
    """Memory of a sender whose receiver stands still.

    Args:
        queued_bytes: Handed to `ship`.
        grown_bytes: Most resident memory meanwhile, above that before.
        grown_after_bytes: Likewise when the receiver went on, until all was committed.
    """

    queued_bytes: int
    grown_bytes: int
    grown_after_bytes: int


def goodput(transport: Transport, folder: Path, effort: Effort) -> dict[str, list[Round]]:
    """Rounds of every way, in turns."""
    with pairs(list(WAYS), transport, folder, BLOCK_TOKENS, effort.blocks or BLOCKS) as them:
        return _in_turns(them, effort.blocks or BLOCKS, AT_ONCE, effort)


def latency(transport: Transport, folder: Path, effort: Effort) -> dict[str, list[Round]]:
    """Rounds of blocks sent one at a time, in turns."""
    with pairs([OURS, BARE, PLAIN], transport, folder, SMALL_TOKENS, effort.blocks or SMALL_BLOCKS) as them:
        return _in_turns(them, effort.blocks or SMALL_BLOCKS, 1, effort)


def together(
    transport: Transport, folder: Path, effort: Effort, count: int = 4
) -> tuple[list[Sent], list[Sequence[Sent]]]:
    """Rounds of one pair alone and of `count` pairs at once, in turns."""
    blocks = effort.blocks or BLOCKS
    alone, all_at_once = list[Sent](), list[Sequence[Sent]]()
    with pairs([OURS] * count, transport, folder, BLOCK_TOKENS, blocks) as them:
        for pair in them:
            pair.round(blocks, AT_ONCE)
        until = time.monotonic() + effort.seconds
        while len(alone) < effort.rounds or time.monotonic() < until:
            alone.append(them[len(alone) % count].round(blocks, AT_ONCE).sent)
            for pair in them:
                pair.begin(blocks, AT_ONCE, go=False)
            for pair in them:
                pair.go()
            all_at_once.append([pair.end().sent for pair in them])
    return alone, all_at_once


def shared_rates(sents: Sequence[Sent]) -> list[float]:
    """Bytes a second of each of several at once, while all of them sent.

    Blocks that were under way at either end of that time count where they ended.
    """
    began, ended = max(sent.began for sent in sents), min(sent.ended[-1] for sent in sents)
    return [(sent.bytes_by(ended) - sent.bytes_by(began)) / (ended - began) for sent in sents]


def stalled(transport: Transport, folder: Path, effort: Effort) -> Stalled:
    """Queues blocks to a receiver that has been stopped, watches the sender's memory, and lets it go on."""
    count = effort.blocks or STALLED_BLOCKS
    with pairs([OURS], transport, folder, STALLED_TOKENS, count) as [pair]:
        pair.round(min(count, BLOCKS), AT_ONCE)  # connected, with buffers as large as they get
        pair.begin(count, count, go=False)
        before = resident_bytes(pair.sender.pid)
        os.kill(pair.receiver.pid, signal.SIGSTOP)
        try:
            pair.go()
            grown = _most_resident(pair, STALLED_SECONDS) - before
        finally:
            os.kill(pair.receiver.pid, signal.SIGCONT)
        after = _most_resident(pair, effort.seconds / 4) - before
        pair.end()
    return Stalled(count * SHAPE.extent_bytes(STALLED_TOKENS), grown, max(grown, after))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _most_resident(pair: Pair, seconds: float) -> int:
    most, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        most = max(most, resident_bytes(pair.sender.pid))
        time.sleep(_SAMPLE_SECONDS)
    return most


def _in_turns(them: Sequence[Pair], count: int, at_once: int, effort: Effort) -> dict[str, list[Round]]:
    rounds: dict[str, list[Round]] = {pair.way: [] for pair in them}
    for pair in them:
        pair.round(count, at_once)  # connected, everything touched
    until, number = time.monotonic() + effort.seconds, 0
    while number < effort.rounds or time.monotonic() < until:
        for pair in them if number % 2 else reversed(them):
            rounds[pair.way].append(pair.round(count, at_once))
        number += 1
    return rounds
