"""One worker as the gateway sees it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from drystone.v1.operations_pb2 import ProcessRole, ProcessStatus
from shared.internal.v1 import worker_pb2
from shared.internal.v1.common_pb2 import Compatibility
from shared.internal.v1.decode_pb2_grpc import DecodeStub
from shared.internal.v1.prefill_pb2_grpc import PrefillStub

if TYPE_CHECKING:
    # Names that exist in the type stubs alone.
    from shared.internal.v1.decode_pb2_grpc import DecodeAsyncStub
    from shared.internal.v1.prefill_pb2_grpc import PrefillAsyncStub

_REMEMBERED_KEYS = 65536


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the gateway sees it.

    Attributes:
        load: Requests (decode) or blocks (prefill) of this gateway that are under way on it.
        resident: Keys that it was last known to hold: soft state, the worker's own answer is what counts.
        tails: Keys of sealed segments of conversations, likewise.
    """

    address: str
    role: ProcessRole.ValueType
    channel: grpc.aio.Channel
    info: worker_pb2.GetInfoResponse | None = None
    status: ProcessStatus = field(default_factory=ProcessStatus)
    detail: str = "not looked at yet"
    load: int = 0
    resident: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    tails: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    @property
    def usable(self) -> bool:
        """True while it may be given work."""
        return not self.detail

    @property
    def worker_id(self) -> str:
        """Its id, or its address before it has said one."""
        return self.info.worker.worker_id if self.info is not None else self.address

    def serves(self, compatibility: Compatibility) -> bool:
        """True when its KV is of this kind."""
        return self.info is not None and self.info.compatibility == compatibility

    def decode(self) -> DecodeAsyncStub:
        """Stub of its Decode service."""
        return DecodeStub(self.channel)

    def prefill(self) -> PrefillAsyncStub:
        """Stub of its Prefill service."""
        return PrefillStub(self.channel)

    def remember_tails(self, keys: Sequence[bytes]) -> None:
        """Notes that segments of a conversation are sealed on it now."""
        for key in keys:
            self.tails[key] = None
            self.tails.move_to_end(key)
        while len(self.tails) > _REMEMBERED_KEYS:
            self.tails.popitem(last=False)

    def remember(self, keys: Sequence[tuple[bytes, int]]) -> None:
        """Notes that blocks (key, tokens) are resident on it now."""
        for key, tokens in keys:
            self.resident[key] = tokens
            self.resident.move_to_end(key)
        while len(self.resident) > _REMEMBERED_KEYS:
            self.resident.popitem(last=False)
