"""A socket that senders connect to: limits first, so that nobody makes this worker allocate what it did not grant."""

from __future__ import annotations

import tempfile
from pathlib import Path

import zmq

from decode_worker.receiving.pairs import PAIR_WINDOW_BYTES
from shared.kv.birth import CHUNK_BYTES
from shared.kv.layout import KvShape
from shared.transfer.curve import ServerSecurity
from shared.transfer.endpoints import end_dead_connections, transport_name
from shared.transfer.envelope import MAX_HEADER_BYTES


class Listener:
    """A bound ROUTER socket.

    Args:
        context: The receiver's.
        shape: Bounds the largest frame that can be right.
        address: What to bind, such as "tcp://127.0.0.1:0".
        security: Puts keys on it; None leaves it in the clear.

    Attributes:
        address: As bound.
        transport: Such as "zmq-tcp".

    Raises:
        OSError: It cannot be bound.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        shape: KvShape,
        address: str,
        security: ServerSecurity | None = None,
    ) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.transport = transport_name(address)
        try:
            limits(self.socket, shape)
            if security is not None:
                security.apply(self.socket)
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise OSError(f"cannot receive KV on {address.partition('://')[2]}: {error}") from error
        except BaseException:
            self.socket.close(0)
            raise
        self.address = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))

    @property
    def curve(self) -> bool:
        """True where senders are authenticated and all is encrypted."""
        return bool(self.socket.getsockopt(zmq.MECHANISM) == zmq.CURVE)

    def name(self, peer: bytes) -> bytes:
        """A peer's name among those of all listeners."""
        return self.transport.encode() + peer

    def close(self) -> None:
        """Closes it, where its thread has not done so."""
        self.socket.close(0)


class Folder:
    """A folder for Unix-domain sockets, of this user alone; gone with `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="drystone-kv-")

    @property
    def address(self) -> str:
        """Address of the socket in it."""
        return f"ipc://{Path(self._folder.name) / 'kv.sock'}"

    def close(self) -> None:
        """Deletes it."""
        self._folder.cleanup()


def limits(socket: zmq.Socket[bytes], shape: KvShape) -> None:
    """Bounds what a sender makes ZeroMQ hold for it, before this worker has looked at a single message."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # Messages queued for one peer: its window in whole chunks, with room for headers; then TCP holds it up.
    socket.setsockopt(zmq.RCVHWM, PAIR_WINDOW_BYTES // CHUNK_BYTES + 64)
    # The largest frame that can be right; ZeroMQ drops a peer that sends more before allocating it.
    socket.setsockopt(zmq.MAXMSGSIZE, max(CHUNK_BYTES, shape.record_bytes) + MAX_HEADER_BYTES)
    end_dead_connections(socket)
