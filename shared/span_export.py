"""Spans on their way to an OpenTelemetry collector. Imported only where there is one: the library takes its time.

    span ends ──▶ queue (2048; then spans are dropped) ── every 5 s, or 512 ──▶ OTLP over gRPC ──▶ collector

Headers, certificates and attributes of the process are OpenTelemetry's own OTEL_* variables.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from shared import logs
from shared.version import VERSION

# Of one export, with its repetitions.
_EXPORT_SECONDS = 5.0


class SpanExport:
    """A tracer and what takes its spans away.

    Args:
        service: Name of the service.
        instance: Which of its processes.
        endpoint: Of the collector, http://host:port or https://host:port.
        sample_ratio: Share of traces kept among those that begin here.
    """

    def __init__(self, service: str, instance: str, endpoint: str, sample_ratio: float) -> None:
        resource = Resource.create(
            {"service.name": service, "service.instance.id": instance, "service.version": VERSION}
        )
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._exporter = _CountingExporter(OTLPSpanExporter(endpoint, timeout=_EXPORT_SECONDS))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._log = logs.get("tracing")
        self._troubles = _Troubles(self._log)
        logging.getLogger("opentelemetry").addHandler(self._troubles)
        self.tracer: Tracer = self._provider.get_tracer("drystone", VERSION)

    @property
    def lost_total(self) -> int:
        """Spans that the collector did not take."""
        return self._exporter.lost_total

    def flush(self) -> None:
        """Sends what waits; takes as long as the collector does."""
        self._provider.force_flush()

    def close(self, seconds: float) -> None:
        """Sends what waits, within this time; what is left then is dropped, counted and logged."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            self._exporter.shutdown()  # ends the attempt that is under way
            closing.join(seconds)
        logging.getLogger("opentelemetry").removeHandler(self._troubles)
        if self.lost_total or closing.is_alive():
            self._log.warning("spans_lost", lost_total=self.lost_total, ended=not closing.is_alive())


class _CountingExporter(SpanExporter):
    def __init__(self, inner: OTLPSpanExporter) -> None:
        self._inner = inner
        self.lost_total = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self.lost_total += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)


class _Troubles(logging.Handler):
    """What the library says of itself, as lines of this process."""

    def __init__(self, log: logs.Logger) -> None:
        super().__init__(logging.WARNING)
        self._structured = log

    def emit(self, record: logging.LogRecord) -> None:
        self._structured.warning("span_export", detail=record.getMessage()[:500])
