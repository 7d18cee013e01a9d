"""How handshakes of a socket end, as ZeroMQ's monitor tells it: what a wrong key looks like from either side."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from enum import StrEnum

import zmq
from zmq.utils.monitor import parse_monitor_message

_NUMBERS = itertools.count(1)
_EVENTS = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)


class Handshake(StrEnum):
    """How one ended.

    A server that was greeted under another key cannot read the greeting: it sees WRONG_KEY, its client BROKEN_OFF. Of
    two that differ in mechanism, one sees MECHANISM; the other perhaps no more than BROKEN_OFF.
    """

    DONE = "done"
    # The peer read the keys and will not have them.
    NOT_ALLOWED = "not_allowed"
    # One side encrypts and the other does not.
    MECHANISM = "no_key"
    WRONG_KEY = "wrong_key"
    BROKEN_OFF = "broken_off"
    MALFORMED = "malformed"


_PROTOCOL = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): Handshake.MECHANISM,
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): Handshake.WRONG_KEY,
}


class HandshakeMonitor:
    """Reads a socket's handshakes. Belongs to the thread that owns the socket.

    Closing it before the socket is its owner's duty, in this order: ZeroMQ's own thread blocks in telling of an event
    that nobody can take any more. For the same reason its queue has no limit; an event is some tens of bytes.

    Args:
        context: Of the socket.
        watched: The socket.
        told: Called with the end of each handshake.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        watched: zmq.Socket[bytes],
        told: Callable[[Handshake], None],
    ) -> None:
        self._watched = watched
        self._told = told
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        address = f"inproc://handshakes-{next(_NUMBERS)}"
        watched.monitor(address, int(_EVENTS))
        self.socket.connect(address)

    def read(self) -> bool:
        """Takes one event without waiting; False when there was none."""
        try:
            event = parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return False
        self._told(_ended(event["event"], event["value"]))
        return True

    def end(self) -> None:
        """Has ZeroMQ tell no more; the reading socket may be closed then."""
        self._watched.monitor(None, 0)


def _ended(event: int, value: int) -> Handshake:
    match zmq.Event(event):
        case zmq.Event.HANDSHAKE_SUCCEEDED:
            return Handshake.DONE
        case zmq.Event.HANDSHAKE_FAILED_AUTH:
            return Handshake.NOT_ALLOWED
        case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
            return _PROTOCOL.get(value, Handshake.MALFORMED)
    return Handshake.BROKEN_OFF
