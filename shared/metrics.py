"""Prometheus metrics: one registry of names, and the page that each process serves them on.

Figures of `shared.status` appear as `drystone_<name>`; histograms and labelled counters are listed here, their
names after vLLM's. Nothing is global: each process makes one `Metrics` and hands it to what observes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.status import FIGURES

PREFIX = "drystone_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
# From a poor wire to several fast ones side by side: 1 MB/s to 200 GB/s.
_BYTES_PER_SECOND = tuple(step * 10.0**power for power in range(6, 12) for step in (1, 2, 5))[:-1]
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HISTOGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "time_to_first_token_seconds": "From a request's arrival at this process to its first token.",
        "inter_token_latency_seconds": "Between two tokens of one sample.",
        "e2e_request_latency_seconds": "From a request's arrival at the gateway to its end.",
        "request_queue_time_seconds": "Decode worker: from a request's arrival to its admission.",
        "request_fetch_time_seconds": "Decode worker: from admission until the last block was there.",
        "request_prefill_time_seconds": "Decode worker: from the last block's arrival to the first token.",
        "request_decode_time_seconds": "Decode worker: from the first token to the request's end.",
        "encode_batch_tokens": "Prefill worker: tokens of one forward.",
        "encode_time_seconds": "Prefill worker: one forward.",
        "disk_read_seconds": "Prefill worker: one block read back from disk, verified.",
        "disk_write_seconds": "Prefill worker: one block written to disk.",
        "object_read_seconds": "Prefill worker: one block read back from the object store, verified.",
        "object_write_seconds": "Prefill worker: one block written to the object store.",
        "kv_transfer_seconds": "Prefill worker: one block shipped, from its offer until it was verified whole.",
        "kv_transfer_bandwidth_bytes_per_second": "Prefill worker: bytes of one block by the time on their way.",
        "kv_credit_wait_seconds": "Prefill worker: of one block's shipping, the time without credit for a ready chunk.",
        "iteration_tokens": "Decode worker: tokens of one step.",
        "step_time_prefill_seconds": "Decode worker: steps that only read questions.",
        "step_time_mixed_seconds": "Decode worker: steps that read questions and generate.",
        "step_time_decode_seconds": "Decode worker: steps that only generate.",
    }
)

COUNTERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "requests_ended": (
            "Decode worker: requests by how they ended: a finish reason, or the reason of an error.",
            "reason",
        ),
        "kv_transfers": ("Prefill worker: blocks shipped, by how that ended.", "outcome"),
        "kv_chunks_resent": ("Prefill worker: chunks sent again, by why.", "reason"),
        "kv_chunks_refused": ("Decode worker: messages of senders refused, by why.", "reason"),
        "kv_transport_fallbacks": (
            "Prefill worker: pairs that fell back from a process group to ZeroMQ, by why.",
            "reason",
        ),
        "kv_connections_denied": ("Decode worker: senders that were not let in, by why.", "reason"),
    }
)

Figures = Callable[[], Mapping[str, float]]


class Metrics:
    """Metrics of one process.

    Args:
        figures: Gives the process's figures when the page is asked for.
        histograms: Names in `HISTOGRAMS` that this process observes.
        counters: Names in `COUNTERS` that it counts.
    """

    def __init__(self, figures: Figures, histograms: Iterable[str] = (), counters: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_FigureCollector(figures))
        self._histograms = {
            name: Histogram(PREFIX + name, HISTOGRAMS[name], registry=self.registry, buckets=_buckets(name))
            for name in histograms
        }
        self._counters = {
            name: Counter(PREFIX + name, COUNTERS[name][0], [COUNTERS[name][1]], registry=self.registry)
            for name in counters
        }
        self._stop: Callable[[], None] = lambda: None

    def observe(self, histogram: str, value: float) -> None:
        """Adds an observation, in the unit of the name; a name that is not registered is a KeyError."""
        self._histograms[histogram].observe(value)

    def count(self, counter: str, label: str, times: int = 1) -> None:
        """Counts one, or several at once; a name that is not registered is a KeyError."""
        self._counters[counter].labels(label).inc(times)

    def serve(self, host: str, port: int) -> None:
        """Serves /metrics on a thread; port 0 serves none. Raises OSError when it cannot bind."""
        if port:
            server, thread = start_http_server(port, addr=host, registry=self.registry)

            def stop() -> None:
                server.shutdown()
                server.server_close()
                thread.join()

            self._stop = stop

    def close(self) -> None:
        """Stops serving."""
        self._stop()


def _buckets(name: str) -> tuple[float, ...]:
    if name.endswith("_bytes_per_second"):
        return _BYTES_PER_SECOND
    return _SECONDS if name.endswith("_seconds") else _TOKENS


class _FigureCollector(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        for name, value in self._figures().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(PREFIX + name, FIGURES[name], value=value)

    def describe(self) -> Iterator[Metric]:
        """Nothing: figures exist only once the process serves."""
        return iter(())
