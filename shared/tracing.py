"""Traces: spans of one request over every process, by OpenTelemetry. docs/observability.md names them.

A request's trace context travels with its messages as a W3C traceparent, never in variables of a thread or task: what
is done for it happens on several of both. A span's own traceparent is what the next process is given.

Nothing here is global: each process makes one `Tracing`. Without a collector it makes no spans and passes traceparents
on as they came.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared import logs
from shared.errors import DrystoneError

if TYPE_CHECKING:
    from shared.span_export import SpanExport

Value = str | int | float | bool
_PREFIX = "drystone."
_W3C: Final = TraceContextTextMapPropagator()


class Span:
    """A piece of work under way. Ended by whoever began it.

    Attributes:
        traceparent: What is caused by it belongs to.
    """

    __slots__ = ("_span", "traceparent")

    def __init__(self, traceparent: str, span: trace.Span | None = None) -> None:
        self.traceparent = traceparent
        self._span = span

    def set(self, **attributes: Value) -> None:
        """Says something about it."""
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def event(self, name: str, **attributes: Value) -> None:
        """Notes that something happened now."""
        if self._span is not None:
            self._span.add_event(name, _named(attributes))


class Tracing:
    """Makes spans of one process.

    Args:
        role: "gateway", "prefill" or "decode".
        worker_id: Which of these.
        endpoint: Of an OTLP collector (gRPC), such as http://collector:4317; empty makes no spans.
        sample_ratio: Share of the traces that begin here that are kept. A trace that began elsewhere is kept when it
            was kept there.
    """

    def __init__(self, role: str, worker_id: str, endpoint: str = "", sample_ratio: float = 1.0) -> None:
        self._export: SpanExport | None = None
        if endpoint:
            from shared.span_export import SpanExport

            self._export = SpanExport(f"drystone-{role}", worker_id, endpoint, sample_ratio)

    @contextmanager
    def span(self, name: str, traceparent: str, **attributes: Value) -> Iterator[Span]:
        """A span of what is done within; what is raised there ends it with an error, leaving does not.

        Args:
            name: Of the kind of work.
            traceparent: What it belongs to; empty begins a trace.
            attributes: What is known at the beginning; names get "drystone." before them.
        """
        if self._export is None:
            yield Span(traceparent or logs.new_traceparent())
            return
        span = self._export.tracer.start_span(name, _context(traceparent), attributes=_named(attributes))
        try:
            yield Span(_traceparent(span), span)
        except Exception as error:
            _fail(span, error)
            raise
        except BaseException:
            span.set_attribute(f"{_PREFIX}cancelled", True)  # noqa: FBT003 - the library's own signature
            raise
        finally:
            span.end()

    def record(
        self,
        name: str,
        traceparent: str,
        began: float,
        ended: float,
        attributes: Mapping[str, Value],
        *,
        events: Iterable[tuple[str, float]] = (),
        error: str = "",
    ) -> None:
        """A span of what has been done already. From any thread.

        Args:
            name: Of the kind of work.
            traceparent: What it belongs to.
            began: `time.monotonic()`.
            ended: `time.monotonic()`.
            attributes: As of `span`.
            events: Names and their `time.monotonic()`.
            error: What went wrong, in words; empty when nothing did.
        """
        if self._export is None:
            return
        zero = time.time_ns() - round(time.monotonic() * 1e9)
        span = self._export.tracer.start_span(
            name, _context(traceparent), attributes=_named(attributes), start_time=zero + round(began * 1e9)
        )
        for event, happened in events:
            span.add_event(event, timestamp=zero + round(happened * 1e9))
        if error:
            span.set_status(trace.StatusCode.ERROR, error)
        span.end(zero + round(ended * 1e9))

    def flush(self) -> None:
        """Sends what waits to the collector; takes as long as that does."""
        if self._export is not None:
            self._export.flush()

    def close(self, seconds: float = 3.0) -> None:
        """Sends what waits, within this time; the rest is dropped and logged. Blocks."""
        if self._export is not None:
            self._export.close(seconds)


# For those who are given none.
NO_TRACING: Final = Tracing("", "")


def _context(traceparent: str) -> Context:
    """Empty for what is no trace context: then a trace begins."""
    return _W3C.extract({"traceparent": traceparent}, Context())


def _traceparent(span: trace.Span) -> str:
    known = span.get_span_context()
    return f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags:02x}"


def _fail(span: trace.Span, error: Exception) -> None:
    if isinstance(error, DrystoneError):  # expected ones: where they came from says nothing
        span.set_attribute("error.type", str(error.reason))
        span.set_status(trace.StatusCode.ERROR, f"{error.reason}: {error.message}")
        return
    span.record_exception(error)
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(trace.StatusCode.ERROR, f"{type(error).__qualname__}: {error}")


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{_PREFIX}{name}": value for name, value in attributes.items()}
