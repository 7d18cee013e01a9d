"""What both clients share: settings, requests, and a stream's progress. No I/O happens here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drystone import _replies as replies
from drystone import _requests as requests
from drystone._config import DEFAULT_ADDRESS, Timeouts, channel_options
from drystone._events import Completed, Event, SampleFinished, Started, TextDelta
from drystone._exceptions import DrystoneError, InternalError
from drystone._results import Answer, FinishReason, Sample, TokenLogprob
from drystone._retries import Retries
from drystone._rpc_errors import from_rpc_error
from drystone._warm_state import WarmState

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpc

    from drystone._prompts import Document, GenerateOptions
    from drystone._warming import WarmOptions
    from drystone.v1 import generation_pb2


class BaseClient:
    """Settings of a client, and the requests that it sends.

    Args:
        address: Gateway's host:port.
        timeouts: How long to wait. None takes the defaults of `Timeouts`.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeouts: Timeouts | None = None) -> None:
        self.address = address
        self.timeouts = timeouts or Timeouts()

    def __repr__(self) -> str:
        """The class and the address."""
        return f"{type(self).__name__}({self.address!r})"

    def _channel_options(self) -> list[tuple[str, int]]:
        return channel_options(self.address, self.timeouts)

    def _generate_request(
        self, question: str | None, options: GenerateOptions
    ) -> tuple[generation_pb2.GenerateRequest, float | None]:
        """The request and its time in seconds."""
        return requests.generate_request(question, options), options.get("timeout", self.timeouts.generate)

    def _warm_state(self, documents: Iterable[Document | str], options: WarmOptions) -> tuple[WarmState, float | None]:
        """The state of a `warm`, and the time of each of its calls in seconds."""
        state = WarmState(documents, options, address=self.address, retries=Retries())
        return state, options.get("timeout", self.timeouts.warm)

    def _error(self, error: grpc.RpcError) -> DrystoneError:
        return from_rpc_error(error, address=self.address)


class Progress:
    """What a stream has brought so far.

    Args:
        address: Gateway's host:port, for errors.
        request_id: The caller's name for the request; the server's replaces it.
    """

    def __init__(self, address: str, request_id: str) -> None:
        self._address = address
        self._asked_id = request_id
        self._started: Started | None = None
        self._completed: Completed | None = None
        self._samples: dict[int, _GrowingSample] = {}

    @property
    def request_id(self) -> str:
        """The request's name, as far as it is known."""
        return self._started.request_id if self._started else self._asked_id

    @property
    def completed(self) -> bool:
        """True when the last event has come."""
        return self._completed is not None

    def take(self, response: generation_pb2.GenerateResponse) -> Event | None:
        """Reads one message and remembers it; None when it holds nothing that this client knows."""
        event = replies.event(response)
        match event:
            case Started():
                self._started = event
            case TextDelta():
                self._sample(event.sample_index).grow(event)
            case SampleFinished():
                self._sample(event.sample_index).finished = event
            case Completed():
                self._completed = event
        return event

    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            InternalError: When the stream ended without its first or its last event.
        """
        started, completed = self._started, self._completed
        if started is None or completed is None:
            raise InternalError("the stream ended before it was complete", request_id=self.request_id)
        samples = [sample.finish() for _, sample in sorted(self._samples.items())] or [_GrowingSample(0).finish()]
        return Answer(
            samples=tuple(samples),
            usage=completed.usage,
            timings=completed.timings,
            blocks=completed.blocks,
            routing=completed.routing,
            request_id=started.request_id,
            model=started.model,
            model_fingerprint=started.model_fingerprint,
            seed=started.seed,
            attention=started.attention,
            truncated_tokens=started.truncated_tokens,
            dropped_documents=started.dropped_documents,
        )

    def error(self, error: grpc.RpcError) -> DrystoneError:
        """The exception for a stream that failed."""
        return from_rpc_error(
            error, address=self._address, request_id=self.request_id, answered=self._started is not None
        )

    def _sample(self, index: int) -> _GrowingSample:
        return self._samples.setdefault(index, _GrowingSample(index))


@dataclass(slots=True)
class _GrowingSample:
    """One sample while its deltas come in."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: SampleFinished | None = None

    def grow(self, delta: TextDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)

    def finish(self) -> Sample:
        return Sample(
            index=self.index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finished.finish_reason if self.finished else FinishReason.UNSPECIFIED,
            matched_stop=self.finished.matched_stop if self.finished else "",
            matched_stop_token_id=self.finished.matched_stop_token_id if self.finished else None,
            logprobs=tuple(self.logprobs),
        )
