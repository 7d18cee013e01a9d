"""The metrics page: figures as they are when asked for, histograms by registered name alone."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.metrics import HISTOGRAMS, Metrics


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_page_shows_figures_and_histograms():
    figures = {"num_requests_running": 3.0, "requests_total": 7.0}
    metrics = Metrics(lambda: figures, HISTOGRAMS)
    metrics.observe("time_to_first_token_seconds", 0.03)
    port = free_port()
    metrics.serve("127.0.0.1", port)
    try:
        figures["num_requests_running"] = 4.0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
    finally:
        metrics.close()
    assert families["drystone_num_requests_running"].samples[0].value == 4.0
    assert families["drystone_requests"].type == "counter"
    counts = {s.name: s.value for s in families["drystone_time_to_first_token_seconds"].samples if not s.labels}
    assert counts["drystone_time_to_first_token_seconds_count"] == 1.0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_unregistered_names_are_defects():
    metrics = Metrics(lambda: {"surprise": 1.0})
    with pytest.raises(KeyError):
        metrics.observe("surprise_seconds", 1.0)
    with pytest.raises(KeyError):
        list(metrics.registry.collect())


def test_port_zero_serves_nothing():
    metrics = Metrics(dict)
    metrics.serve("127.0.0.1", 0)
    metrics.close()


def test_labelled_counters_count_several_at_once():
    metrics = Metrics(dict, counters=["kv_chunks_resent"])
    metrics.count("kv_chunks_resent", "LOST", 3)
    metrics.count("kv_chunks_resent", "LOST")
    assert metrics.registry.get_sample_value("drystone_kv_chunks_resent_total", {"reason": "LOST"}) == 4.0


def test_every_histogram_has_buckets_of_its_unit():
    metrics = Metrics(dict, HISTOGRAMS)
    metrics.observe("kv_transfer_bandwidth_bytes_per_second", 3e9)
    name = "drystone_kv_transfer_bandwidth_bytes_per_second_bucket"
    assert metrics.registry.get_sample_value(name, {"le": "2e+09"}) == 0.0
    assert metrics.registry.get_sample_value(name, {"le": "5e+09"}) == 1.0
