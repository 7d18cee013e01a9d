"""Addresses that KV travels between: which one of a decode worker's a sender takes."""

from __future__ import annotations

import os
from typing import Protocol

import zmq

from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import KvEndpoint
from shared.runtime import host_name


class ClientSecurity(Protocol):
    """What puts keys on a sender's socket."""

    def apply(self, socket: zmq.Socket[bytes], endpoint: KvEndpoint) -> None:
        """Makes a socket ready for an endpoint; raises DrystoneError when that one may not be sent to."""
        ...


def chosen_address(endpoint: KvEndpoint) -> str:
    """Unix-domain where the receiver's socket file is on this host and may be opened, else TCP.

    Raises:
        DrystoneError: TRANSFER_FAILED; the endpoint names no address that KV travels to.
    """
    path = endpoint.ipc_address.removeprefix("ipc://")
    if path and endpoint.host == host_name() and os.access(path, os.R_OK | os.W_OK):
        return endpoint.ipc_address
    if not endpoint.zmq_address.startswith("tcp://"):
        raise DrystoneError(Reason.TRANSFER_FAILED, f"{endpoint.zmq_address[:200]!r} is no tcp:// address")
    return endpoint.zmq_address


def transport_name(address: str) -> str:
    """As status and metrics have it: "zmq-tcp" or "zmq-ipc"."""
    return f"zmq-{address.partition(':')[0]}"
