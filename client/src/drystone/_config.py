"""Where the gateway is and how long to wait for it: defaults, each with a name."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

DEFAULT_ADDRESS: Final = "127.0.0.1:7700"

# Both directions: a request carries whole documents, an event at most the statistics of every block.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a client waits, in seconds.

    Args:
        connect: For one attempt to reach the gateway.
        generate: For a whole answer, from the call to its last event. None leaves it to the server.
        warm: For one call of warming, which carries at most 256 documents.
        blocks: For one call about stored blocks: a page of them, pinning, deletion.
        control: For every other call.
    """

    connect: float = 5.0
    generate: float | None = 600.0
    warm: float | None = 1800.0
    blocks: float | None = 60.0
    control: float | None = 10.0


def channel_options(address: str, timeouts: Timeouts) -> list[tuple[str, int]]:
    """The gRPC channel options of a client of `address` (host:port)."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # gRPC takes this as the least time that it grants a connection attempt, and its own is 20 s.
        ("grpc.min_reconnect_backoff_ms", int(timeouts.connect * 1000)),
        ("grpc.enable_http_proxy", 0 if _is_loopback(address) else 1),
    ]


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
