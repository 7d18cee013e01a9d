"""The workers that this gateway knows: looked at regularly, used only while they fit."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from drystone.v1.operations_pb2 import ProcessRole, ProcessState, ProcessStatus
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import worker_pb2
from shared.internal.v1.common_pb2 import Compatibility
from shared.internal.v1.decode_pb2_grpc import DecodeStub
from shared.internal.v1.prefill_pb2_grpc import PrefillStub
from shared.internal.v1.worker_pb2_grpc import WorkerStub
from shared.kv.keys import KeySpace
from shared.rpc.channel import open_channel

if TYPE_CHECKING:
    # Names that exist in the type stubs alone.
    from shared.internal.v1.decode_pb2_grpc import DecodeAsyncStub
    from shared.internal.v1.prefill_pb2_grpc import PrefillAsyncStub

_LOOK_SECONDS = 3.0
_TOO_EARLY = "no decode worker to compare with yet"
_REMEMBERED_KEYS = 65536


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the gateway sees it.

    Attributes:
        load: Requests (decode) or blocks (prefill) of this gateway that are under way on it.
        resident: Keys that it was last known to hold: soft state, the worker's own answer is what counts.
    """

    address: str
    role: ProcessRole.ValueType
    channel: grpc.aio.Channel
    info: worker_pb2.GetInfoResponse | None = None
    status: ProcessStatus = field(default_factory=ProcessStatus)
    detail: str = "not looked at yet"
    load: int = 0
    resident: OrderedDict[bytes, int] = field(default_factory=OrderedDict)

    @property
    def usable(self) -> bool:
        """True while it may be given work."""
        return not self.detail

    @property
    def worker_id(self) -> str:
        """Its id, or its address before it has said one."""
        return self.info.worker.worker_id if self.info is not None else self.address

    def decode(self) -> DecodeAsyncStub:
        """Stub of its Decode service."""
        return DecodeStub(self.channel)

    def prefill(self) -> PrefillAsyncStub:
        """Stub of its Prefill service."""
        return PrefillStub(self.channel)

    def remember(self, keys: Sequence[tuple[bytes, int]]) -> None:
        """Notes that blocks (key, tokens) are resident on it now."""
        for key, tokens in keys:
            self.resident[key] = tokens
            self.resident.move_to_end(key)
        while len(self.resident) > _REMEMBERED_KEYS:
            self.resident.popitem(last=False)


class Cluster:
    """All workers of one model.

    Args:
        model_name: Name that clients ask for.
        decode: Addresses of decode workers.
        prefill: Addresses of prefill workers.
        poll_seconds: Time between looks.
    """

    def __init__(self, model_name: str, decode: Sequence[str], prefill: Sequence[str], poll_seconds: float) -> None:
        self.model_name = model_name
        self._poll_seconds = poll_seconds
        roles = ProcessRole.PROCESS_ROLE_DECODE, ProcessRole.PROCESS_ROLE_PREFILL
        self.workers = [
            Worker(address, role, open_channel(address))
            for role, addresses in zip(roles, (decode, prefill), strict=True)
            for address in addresses
        ]
        self._looked = asyncio.Event()
        self._log = logs.get("cluster")
        self.compatibility: Compatibility | None = None

    @property
    def decode_workers(self) -> list[Worker]:
        """Decode workers that may be given work."""
        return [w for w in self.workers if w.role == ProcessRole.PROCESS_ROLE_DECODE and w.usable]

    @property
    def prefill_workers(self) -> list[Worker]:
        """Prefill workers that may be given work."""
        return [w for w in self.workers if w.role == ProcessRole.PROCESS_ROLE_PREFILL and w.usable]

    @property
    def info(self) -> worker_pb2.GetInfoResponse:
        """What the decode workers say of the model; raises DrystoneError while none is ready."""
        for worker in self.decode_workers:
            if worker.info is not None:
                return worker.info
        states = "; ".join(f"{w.worker_id}: {w.detail or 'ready'}" for w in self.workers) or "none is configured"
        raise DrystoneError(Reason.NO_DECODE_WORKER, f"no decode worker is ready ({states})", retry_after_ms=1000)

    def key_space(self, tenant_salt: bytes = b"") -> KeySpace:
        """What block keys of this model are made of."""
        ours = self.info.compatibility
        return KeySpace(ours.model_fingerprint, ours.dtype, ours.layout_version, ours.rope_regime, tenant_salt)

    async def run(self) -> None:
        """Looks at every worker until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._poll_seconds)

    async def look(self) -> None:
        """Looks at every worker once, at the same time."""
        await asyncio.gather(*(self._look_at(worker) for worker in self.workers))
        for worker in self.workers:
            if worker.detail == _TOO_EARLY and worker.info is not None:
                self._judge(worker, worker.info, worker.status)

    async def close(self) -> None:
        """Closes every channel."""
        for worker in self.workers:
            await worker.channel.close()

    async def _look_at(self, worker: Worker) -> None:
        stub = WorkerStub(worker.channel)
        began = time.monotonic()
        try:
            info = await stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=_LOOK_SECONDS)
            answer = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=_LOOK_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._set_detail(worker, f"does not answer: {error.code().name} after {time.monotonic() - began:.1f} s")
        else:
            self._judge(worker, info, answer.status)

    def _set_detail(self, worker: Worker, detail: str) -> None:
        # How long it took differs each time and is no news.
        if worker.detail.partition(" after ")[0] != detail.partition(" after ")[0]:
            self._log.info("worker", worker_id=worker.worker_id, address=worker.address, detail=detail or "ready")
        worker.detail = detail

    def _judge(self, worker: Worker, info: worker_pb2.GetInfoResponse, status: ProcessStatus) -> None:
        if worker.info is not None and worker.info.worker.incarnation != info.worker.incarnation:
            worker.resident.clear()
        worker.info, worker.status = info, status
        if info.role != worker.role:
            detail = f"is a {ProcessRole.Name(info.role)}"
        elif status.state != ProcessState.PROCESS_STATE_READY:
            detail = ProcessState.Name(status.state).removeprefix("PROCESS_STATE_").lower()
        else:
            detail = self._differs(worker, info)
        self._set_detail(worker, detail)

    def _differs(self, worker: Worker, info: worker_pb2.GetInfoResponse) -> str:
        """Says in which field a worker differs from those in use, or nothing.

        Decode workers set what all must be: the first one, and again when none of those in use is left.
        """
        others = any(other is not worker for other in self.decode_workers)
        if worker.role == ProcessRole.PROCESS_ROLE_DECODE and not others:
            self.compatibility = info.compatibility
        if self.compatibility is None:
            return _TOO_EARLY
        for field_ in Compatibility.DESCRIPTOR.fields:
            if getattr(info.compatibility, field_.name) != getattr(self.compatibility, field_.name):
                return f"differs from the other workers in {field_.name}"
        return ""

    def statuses(self) -> list[ProcessStatus]:
        """Every worker, for `drystone status`."""
        return [self._status(worker) for worker in self.workers]

    def _status(self, worker: Worker) -> ProcessStatus:
        status = ProcessStatus()
        status.CopyFrom(worker.status)
        status.role, status.address, status.detail = worker.role, worker.address, worker.detail
        status.worker_id = worker.worker_id
        if worker.info is None or worker.detail.startswith("does not answer"):
            status.state = ProcessState.PROCESS_STATE_UNREACHABLE
        elif not worker.usable and status.state == ProcessState.PROCESS_STATE_READY:
            status.state = ProcessState.PROCESS_STATE_UNUSABLE
        return status
