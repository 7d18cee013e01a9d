"""Prometheus metrics: one registry of names, and the page that each process serves them on.

Figures of `shared.status` appear as `drystone_<name>`; histograms are listed here, their names after
vLLM's. Nothing is global: each process makes one `Metrics` and hands it to what observes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.status import FIGURES

PREFIX = "drystone_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
HISTOGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "time_to_first_token_seconds": "From a request's arrival at the gateway to its first token sent.",
        "inter_token_latency_seconds": "Between two tokens of a request sent by the gateway.",
        "e2e_request_latency_seconds": "From a request's arrival at the gateway to its end.",
    }
)

Figures = Callable[[], Mapping[str, float]]


class Metrics:
    """Metrics of one process.

    Args:
        figures: Gives the process's figures when the page is asked for.
        histograms: Names in `HISTOGRAMS` that this process observes.
    """

    def __init__(self, figures: Figures, histograms: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_FigureCollector(figures))
        self._histograms = {
            name: Histogram(PREFIX + name, HISTOGRAMS[name], registry=self.registry, buckets=_SECONDS)
            for name in histograms
        }
        self._stop: Callable[[], None] = lambda: None

    def observe(self, histogram: str, seconds: float) -> None:
        """Adds an observation; a name that is not registered is a KeyError."""
        self._histograms[histogram].observe(seconds)

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
