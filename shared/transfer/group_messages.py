"""What a worker and the process that owns its process group say to each other, over two pipes.

    worker ── one JSON line (Order), then records ──▶ stdin  of the process
    worker ◀── records ───────────────────────────── stdout of the process

A record is 32 bytes; FAILED is followed by as many bytes of text as it says.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Literal

from shared.transfer.choice import Backend

Role = Literal["send", "receive"]
# kind, number, offset, length
RECORD = struct.Struct("<B7xQQQ")
MAX_TEXT_BYTES = 400
MAX_NAME_BYTES = 64
# Reason of a GroupEnd that is no failure.
GROUP_IDLE = "IDLE"


class Kind(IntEnum):
    """Of a record."""

    # To the process: send or receive the run `number`, which lies at `offset` of the staging memory.
    RUN = 1
    # From the receiving one: the other may come; `number` is the port.
    LISTENING = 2
    # From both: bytes have gone both ways.
    READY = 3
    # From both: run `number` is sent, or there.
    DONE = 4
    # From both: it has given up; `length` bytes of text follow.
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Order:
    """What the process is to do.

    Attributes:
        role: Of this end.
        backend: "gloo" or "nccl".
        address: Where the store listens: this host's own.
        port: Likewise; 0 for the receiving end, which listens.
        name: Of the group in its store; nobody else knows it.
        ordinal: Of the GPU, for NCCL.
        seconds: Longest time for the two to meet, and for one run.
        staging_fd: Memory shared with the worker, inherited.
        staging_bytes: Its size.
    """

    role: Role
    backend: Backend
    address: str
    port: int
    name: str
    ordinal: int
    seconds: float
    staging_fd: int
    staging_bytes: int

    def line(self) -> bytes:
        """As it travels."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def of(line: bytes) -> Order:
        """From the line."""
        return Order(**json.loads(line))
