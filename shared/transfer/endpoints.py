"""Addresses that KV travels between: which one of a decode worker's a sender takes."""

from __future__ import annotations

import os
import stat

import zmq

from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import KvEndpoint
from shared.runtime import host_name

# Until a connection has greeted: it holds a descriptor, and may hold a frame of the largest size.
_HANDSHAKE_MILLISECONDS = 5_000


def chosen_address(endpoint: KvEndpoint) -> str:
    """Unix-domain where the receiver's socket file is on this host and may be opened, else TCP.

    Raises:
        DrystoneError: TRANSFER_FAILED; the endpoint names no address that KV travels to.
    """
    path = endpoint.ipc_address.removeprefix("ipc://")
    if path and endpoint.host == host_name() and _is_ours(path):
        return endpoint.ipc_address
    if not endpoint.zmq_address.startswith("tcp://"):
        raise DrystoneError(Reason.TRANSFER_FAILED, f"{endpoint.zmq_address[:200]!r} is no tcp:// address")
    return endpoint.zmq_address


def _is_ours(path: str) -> bool:
    """A socket of this very user, in a folder of this user alone: the only ones that need no key."""
    try:
        socket, folder = os.stat(path), os.stat(os.path.dirname(path))  # noqa: PTH116, PTH120 - not a Path yet
    except (OSError, ValueError):
        return False
    private = folder.st_uid == os.getuid() and not folder.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return private and stat.S_ISSOCK(socket.st_mode) and socket.st_uid == os.getuid()


def end_dead_connections(socket: zmq.Socket[bytes]) -> None:
    """Ends connections that come to nothing: those that never greet, and those whose peer's machine is gone."""
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MILLISECONDS)
    # TCP's own probes, for they do not wait behind data as ZeroMQ's heartbeats do.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)


def transport_name(address: str) -> str:
    """As status and metrics have it: "zmq-tcp" or "zmq-ipc"."""
    return f"zmq-{address.partition(':')[0]}"
