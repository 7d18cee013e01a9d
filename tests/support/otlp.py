"""A collector of spans: the real protocol on a free port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Attributes = dict[str, object]


class Collector(TraceServiceServicer):
    """Keeps what it is sent.

    Attributes:
        spans: With the service that sent each.
        endpoint: http://host:port.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.endpoint = ""
        self._lock = threading.Lock()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802 - gRPC fixes the name
        """Takes spans."""
        del context
        with self._lock:
            for resource in request.resource_spans:
                service = str(attributes_of(resource.resource)["service.name"])
                self.spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
        return pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """Spans of a name."""
        return [span for _, span in self.spans if span.name == name]


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that serves meanwhile."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Collector()
    add_TraceServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        server.stop(0).wait()


def attributes_of(of: Any) -> Attributes:
    """Attributes of a span, an event or a resource, as plain values."""
    return {pair.key: getattr(pair.value, kind) for pair in of.attributes if (kind := pair.value.WhichOneof("value"))}
