"""Requests and the fetches that they wait for: what they are, how far they have come, what they hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from decode_worker.arena import Extent
from decode_worker.blocks import Pin
from decode_worker.landing import Landing
from decode_worker.sample import Sample
from decode_worker.step import Placement
from drystone.v1.generation_pb2 import Priority
from drystone.v1.sampling_pb2 import SamplingParams
from shared.internal.v1.common_pb2 import BlockRef
from shared.internal.v1.decode_pb2 import Arrival, GenerateResponse
from shared.kv.tails import root_key

Sink = Callable[[GenerateResponse], None]
# Seconds of waiting that are worth one class of priority.
AGING_SECONDS = 5.0


class Phase(IntEnum):
    """Where a request is; anything from FINISHED on takes no further part."""

    WAITING = 0
    FETCHING = 1
    READY = 2
    PREFILL = 3
    DECODE = 4
    FINISHED = 5


@dataclass(eq=False, repr=False)
class Request:
    """One prompt and the samples drawn from it. Mutated by the engine's event loop alone.

    Attributes:
        samples: At least one. The first that is not finished reads the question for all.
        deadline: `time.monotonic()` at which it ends.
        sink: Takes its messages; never blocks.
        priority: Who goes first when there is more work than room.
        keep_tail: Seal the tails at the end, for follow-ups.
        reuse_tail: Begin with what is sealed already.
        tail_salt: Of the tails' keys.
        tenant: On whose behalf it runs.
        tail_keys: Sealed segments, once samples have ended.
        tail_tokens_reused: Question tokens that a sealed tail held already.
    """

    request_id: str
    call_id: int
    traceparent: str
    blocks: Sequence[BlockRef]
    question_ids: Sequence[int]
    sampling: SamplingParams
    samples: Sequence[Sample]
    deadline: float
    sink: Sink
    priority: Priority.ValueType = Priority.PRIORITY_NORMAL
    keep_tail: bool = False
    reuse_tail: bool = False
    tail_salt: bytes = b""
    tenant: str = ""
    phase: Phase = Phase.WAITING
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    fetched: float = 0.0
    first_token: float = 0.0
    steps: int = 0
    tail_keys: list[bytes] = field(default_factory=list)
    tail_tokens_reused: int = 0
    # What it holds. `release` is the one place where all of it ends.
    pins: list[Pin] = field(default_factory=list)
    fetches: set[Fetch] = field(default_factory=set)
    placements: list[Placement] = field(default_factory=list)
    arrivals: dict[bytes, Arrival] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """True once it takes no further part."""
        return self.phase >= Phase.FINISHED

    @property
    def turn(self) -> float:
        """Who goes first: the lower. A class of priority is worth AGING_SECONDS of waiting, so nobody starves."""
        return self.arrived - AGING_SECONDS * (self.priority or Priority.PRIORITY_NORMAL)

    @property
    def live(self) -> list[Sample]:
        """Samples that are not finished."""
        return [sample for sample in self.samples if not sample.finished]

    @cached_property
    def question_start(self) -> int:
        """Global position of the question's first token."""
        return sum(len(block.token_ids) for block in self.blocks)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.question_start + len(self.question_ids)

    @property
    def tail_tokens(self) -> int:
        """Tokens that a sample's tail must hold."""
        return len(self.question_ids) + self.sampling.max_new_tokens

    @cached_property
    def tail_root(self) -> bytes:
        """Root of its tails' keys."""
        return root_key(self.tail_salt, (block.key for block in self.blocks))

    def release(self) -> None:
        """Ends every hold on memory. Safe to repeat."""
        for sample in self.samples:
            sample.release()
        pins, self.pins = self.pins, []
        for pin in pins:
            pin.close()
        self.placements = []


@dataclass(slots=True, eq=False, repr=False)
class Fetch:
    """One block on its way. `waiters[0]` drives.

    Attributes:
        store: Keep the block after its users; a deletion on the way takes it back.
        tenant: Whose request opened it.
        landing: What the receiving thread knows of it.
    """

    landing: Landing
    token_ids: Sequence[int]
    reservation_id: int
    store: bool
    tenant: str = ""
    waiters: list[Request] = field(default_factory=list)
    reserved_at: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> bytes:
        """Of the block, 32 bytes."""
        return self.landing.key

    @property
    def extent(self) -> Extent:
        """Where the block goes."""
        return self.landing.extent

    @property
    def epoch(self) -> int:
        """Rises each time it is driven anew."""
        return self.landing.epoch

    @property
    def encoding(self) -> bool:
        """True while the engine thread writes the extent; it is not freed or moved until that ends."""
        return self.landing.local

    def restart(self) -> bool:
        """Begins a new epoch; False for what is whole already, whose commit is near."""
        return self.landing.restart()
