"""Who may connect: the answers to ZeroMQ's own question (ZAP, RFC 27) at each handshake.

    ZeroMQ's thread ── inproc://zeromq.zap.01 ──▶ this handler, on the thread that owns the sockets ──▶ 200 or 400

One for each context. Until it answers a handshake waits; without it none succeeds, for sockets here ask for it by name.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.utils import z85

DOMAIN = "drystone-kv"
_ADDRESS = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
# version, request id, domain, address, routing id, mechanism, then what the mechanism has: a key, for CURVE.
_FRAMES = 7


class ZapHandler:
    """Answers for CURVE clients of `DOMAIN`; everybody else is refused.

    Args:
        context: Whose sockets ask.
        allows: Says of a public key (Z85) and the client's address whether it may connect.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allows: Callable[[str, str], bool]) -> None:
        self._allows = allows
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ADDRESS)

    def read(self) -> bool:
        """Answers one question without waiting; False when there was none."""
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        allowed = False
        try:
            allowed = self._allowed(frames)
        finally:  # who asked waits, and so does everybody behind it
            request_id = frames[1] if len(frames) > 1 else b""
            status, text = (b"200", b"OK") if allowed else (b"400", b"not allowed")
            self.socket.send_multipart([_VERSION, request_id, status, text, b"", b""], zmq.NOBLOCK)
        return True

    def _allowed(self, frames: list[bytes]) -> bool:
        if len(frames) != _FRAMES:
            return False
        version, _, domain, address, _, mechanism, key = frames
        if (version, domain, mechanism) != (_VERSION, DOMAIN.encode(), b"CURVE"):
            return False
        return self._allows(z85.encode(key).decode(), address.decode("utf-8", "replace"))
