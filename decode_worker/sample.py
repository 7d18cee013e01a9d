"""One sample of a request: what it has said, and the tail that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from decode_worker.sampling import SampleState
from decode_worker.tail import Tail
from decode_worker.text import TextStream
from drystone.v1.sampling_pb2 import FinishReason


@dataclass(slots=True, eq=False, repr=False)
class Sample:
    """Mutated by the engine's event loop alone; the engine thread only reads it during a step.

    Attributes:
        state: What its next token depends on.
        text: What of it may be said.
        resumed: Tokens said before an interruption, to be read again.
        untold: Text of those that the caller has not got yet.
        over: Why it had ended before the interruption, when the caller was not told.
        unread: Tokens whose KV is not yet in the tail: the question's, those resumed, then the last one generated.
        finished: It takes no further part.
    """

    state: SampleState
    text: TextStream
    resumed: Sequence[int] = ()
    untold: str = ""
    over: FinishReason.ValueType | None = None
    unread: list[int] = field(default_factory=list)
    tail: Tail | None = None
    finished: bool = False

    @property
    def index(self) -> int:
        """Index in the request, from 0."""
        return self.state.sample_index

    @property
    def generated(self) -> list[int]:
        """Tokens of the answer, those from before an interruption included."""
        return self.state.generated

    def read(self, tokens: int) -> None:
        """The next `tokens` unread tokens have their KV in the tail now."""
        if self.tail is None:
            raise AssertionError(f"sample {self.index} was run without a tail")
        self.tail.filled += tokens
        self.unread = self.unread[tokens:]

    def release(self) -> None:
        """Gives its tail back. Safe to repeat."""
        tail, self.tail = self.tail, None
        if tail is not None:
            tail.close()
