"""Requests and the fetches that they wait for: what they are, how far they have come, what they hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from decode_worker.arena import Extent
from decode_worker.blocks import Pin
from decode_worker.step import Placement
from decode_worker.tail import Tail
from decode_worker.text import TextStream
from drystone.v1.sampling_pb2 import SamplingParams
from shared.internal.v1.common_pb2 import BlockRef
from shared.internal.v1.decode_pb2 import Arrival, GenerateResponse

Sink = Callable[[GenerateResponse], None]


class Phase(IntEnum):
    """Where a request is; anything from FINISHED on takes no further part."""

    WAITING = 0
    FETCHING = 1
    PREFILL = 2
    DECODE = 3
    FINISHED = 4


@dataclass(slots=True, eq=False)
class Request:
    """One sample's generation. Mutated by the engine's event loop alone.

    Attributes:
        deadline: `time.monotonic()` at which it ends.
        sink: Takes its messages; never blocks.
        stop_ids: Tokens that end the answer.
        unread: Tokens whose KV is not yet in the tail: question tokens, then the last token generated.
    """

    request_id: str
    call_id: int
    traceparent: str
    blocks: Sequence[BlockRef]
    question_ids: Sequence[int]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    deadline: float
    sink: Sink
    text: TextStream
    phase: Phase = Phase.WAITING
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    fetched: float = 0.0
    first_token: float = 0.0
    steps: int = 0
    unread: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    # What it holds. `release` is the one place where all of it ends.
    pins: list[Pin] = field(default_factory=list)
    tail: Tail | None = None
    fetches: set[Fetch] = field(default_factory=set)
    placements: list[Placement] = field(default_factory=list)
    arrivals: dict[bytes, Arrival] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """True once it takes no further part."""
        return self.phase >= Phase.FINISHED

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.question_start + len(self.question_ids)

    @property
    def question_start(self) -> int:
        """Global position of the question's first token."""
        return sum(len(block.token_ids) for block in self.blocks)

    @property
    def tail_tokens(self) -> int:
        """Tokens that the tail must hold."""
        return len(self.question_ids) + self.sampling.max_new_tokens

    def release(self) -> None:
        """Ends every hold on memory. Safe to repeat."""
        pins, self.pins = self.pins, []
        for pin in pins:
            pin.close()
        if self.tail is not None:
            self.tail.close()
            self.tail = None
        self.placements = []


@dataclass(slots=True, eq=False)
class Fetch:
    """One block on its way. `waiters[0]` drives.

    Attributes:
        birth_id: Birth offered in this epoch; empty before the offer.
        taken: Chunks verified in this epoch.
        moved_at: `time.monotonic()` of the last chunk taken, or of the last drive.
        encoding: True while the engine thread writes the extent; it is not freed until that ends.
    """

    key: bytes
    token_ids: Sequence[int]
    extent: Extent
    reservation_id: int
    store: bool
    epoch: int = 1
    waiters: list[Request] = field(default_factory=list)
    birth_id: bytes = b""
    taken: set[int] = field(default_factory=set)
    received_bytes: int = 0
    encoding: bool = False
    reserved_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Begins a new epoch: nothing that was taken before counts."""
        self.epoch += 1
        self.birth_id = b""
        self.taken.clear()
        self.received_bytes = 0
        self.moved_at = time.monotonic()
