"""Spans reach a collector over the real protocol, belong together, and say how they ended; without one nothing is."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from shared.errors import DrystoneError, Reason
from shared.tracing import Tracing
from tests.support.otlp import attributes_of, collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"
SAMPLED = 1


@pytest.fixture
def warnings() -> Iterator[None]:
    """Warnings are logged; tests otherwise log errors alone."""
    usual = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.configure(wrapper_class=usual)


def test_spans_of_one_trace_name_their_parents():
    with collector() as sink:
        one, other = Tracing("gateway", "g", sink.endpoint), Tracing("prefill", "p", sink.endpoint)
        with one.span("outer", "", blocks=3) as outer, other.span("inner", outer.traceparent) as inner:
            inner.event("half way", bytes=7)
            inner.set(source="ram")
        one.close()
        other.close()
    (outer_span,), (inner_span,) = sink.named("outer"), sink.named("inner")
    assert {service for service, _ in sink.spans} == {"drystone-gateway", "drystone-prefill"}
    assert outer_span.parent_span_id == b""
    assert inner_span.parent_span_id == outer_span.span_id
    assert inner_span.trace_id == outer_span.trace_id
    assert attributes_of(outer_span) == {"drystone.blocks": 3}
    assert attributes_of(inner_span) == {"drystone.source": "ram"}
    assert attributes_of(inner_span.events[0]) == {"drystone.bytes": 7}
    assert outer.traceparent == f"00-{outer_span.trace_id.hex()}-{outer_span.span_id.hex()}-{outer.traceparent[-2:]}"


def test_a_span_of_another_process_is_continued():
    with collector() as sink:
        tracing = Tracing("decode", "d", sink.endpoint)
        with tracing.span("work", PARENT) as span:
            pass
        tracing.close()
    (work,) = sink.named("work")
    assert work.trace_id.hex() == PARENT.split("-")[1] == span.traceparent.split("-")[1]
    assert work.parent_span_id.hex() == PARENT.split("-")[2]


@pytest.mark.parametrize("bad", ["", "x", "00-short-id-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 500])
def test_what_is_no_trace_context_begins_a_trace(bad: str):
    with collector() as sink:
        tracing = Tracing("gateway", "g", sink.endpoint)
        with tracing.span("work", bad):
            pass
        tracing.close()
    assert sink.named("work")[0].parent_span_id == b""


def test_errors_and_leaving_are_told_apart():
    with collector() as sink:
        tracing = Tracing("gateway", "g", sink.endpoint)
        for name, error in (
            ("refused", DrystoneError(Reason.DEADLINE_EXCEEDED, "too late")),
            ("defect", KeyError("what")),
            ("left", asyncio.CancelledError()),
        ):
            with pytest.raises(type(error)), tracing.span(name, PARENT):
                raise error
        tracing.close()
    refused, defect, left = (sink.named(name)[0] for name in ("refused", "defect", "left"))
    assert refused.status.code == defect.status.code == Status.STATUS_CODE_ERROR
    assert refused.status.message == "DEADLINE_EXCEEDED: too late"
    assert attributes_of(refused) == {"error.type": "DEADLINE_EXCEEDED"}
    assert attributes_of(defect.events[0])["exception.type"] == "KeyError"
    assert left.status.code == Status.STATUS_CODE_UNSET
    assert attributes_of(left) == {"drystone.cancelled": True}


def test_what_was_done_before_keeps_its_times():
    with collector() as sink:
        tracing = Tracing("prefill", "p", sink.endpoint)
        now = time.monotonic()
        tracing.record("transfer", PARENT, now - 3, now - 1, {"bytes": 5}, events=[("offered", now - 2)], error="lost")
        told = time.time_ns()
        tracing.close()
    (span,) = sink.named("transfer")
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(2e9, abs=1e3)
    assert span.events[0].time_unix_nano - span.start_time_unix_nano == pytest.approx(1e9, abs=1e3)
    # Another clock, read at another moment: far less than the second that a mixed-up clock would be off.
    assert told - span.end_time_unix_nano == pytest.approx(1e9, abs=5e8)
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "lost")


def test_only_a_share_of_new_traces_is_kept_and_what_others_keep_always():
    with collector() as sink:
        tracing = Tracing("gateway", "g", sink.endpoint, sample_ratio=0.0)
        with tracing.span("new", "") as new:
            assert not int(new.traceparent[-2:], 16) & SAMPLED
        with tracing.span("theirs", PARENT), tracing.span("not theirs", UNSAMPLED):
            tracing.record("nor this", UNSAMPLED, 0.0, 1.0, {})
        tracing.close()
    assert [span.name for _, span in sink.spans] == ["theirs"]


def test_without_a_collector_traceparents_pass_as_they_came():
    tracing = Tracing("gateway", "g")
    with tracing.span("work", PARENT, blocks=1) as span:
        span.event("nothing")
        span.set(nothing=1)
    tracing.record("work", PARENT, 0.0, 1.0, {})
    assert span.traceparent == PARENT
    with tracing.span("work", "") as span:
        assert span.traceparent.endswith("-00")  # nobody recorded it
    tracing.close()


def test_the_exporter_is_not_even_imported_without_a_collector():
    code = (
        "import sys; from shared.tracing import Tracing; Tracing('gateway', 'g');"
        "sys.exit('opentelemetry.sdk' in sys.modules or 'opentelemetry.exporter' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("warnings")
def test_a_dead_collector_costs_a_bounded_close_and_is_logged():
    with socket.socket() as held, structlog.testing.capture_logs() as lines:
        held.bind(("127.0.0.1", 0))  # nobody listens there
        tracing = Tracing("gateway", "g", f"http://127.0.0.1:{held.getsockname()[1]}")
        with tracing.span("work", ""):
            pass
        tracing.close(0.2)
    assert {"span_export", "spans_lost"} <= {line["event"] for line in lines}
    assert next(line for line in lines if line["event"] == "spans_lost")["lost_total"] == 1
