"""Channels to peers, with the limits and keepalive that all of ours use."""

from __future__ import annotations

import grpc

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A peer that vanishes without closing is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A lazily connecting channel to host:port; its opener closes it."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
