"""The workers that this gateway knows: looked at regularly, used only while they fit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc

from drystone.v1.operations_pb2 import ProcessRole, ProcessState, ProcessStatus
from gateway.worker import Worker
from shared import logs
from shared.enums import enum_name
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import worker_pb2
from shared.internal.v1.common_pb2 import Compatibility
from shared.internal.v1.worker_pb2_grpc import WorkerStub
from shared.rpc.channel import open_channel

_LOOK_SECONDS = 3.0
_TOO_EARLY = "no decode worker to compare with yet"
_DIFFERS = "differs from the other workers in "
_OTHER_TOKENIZER = "differs from the gateway in tokenizer_fingerprint"
_SAME_ID = "has the worker id of "
# What may have changed when all have answered: who is held against whom depends on who answered first.
_TO_JUDGE_AGAIN = (_TOO_EARLY, _DIFFERS, _SAME_ID)


class Cluster:
    """All workers of one model.

    Args:
        model_name: Name that clients ask for.
        decode: Addresses of decode workers.
        prefill: Addresses of prefill workers.
        poll_seconds: Time between looks.
        tokenizer_fingerprint: Of the tokenizer that makes this gateway's token ids.
    """

    def __init__(
        self,
        model_name: str,
        decode: Sequence[str],
        prefill: Sequence[str],
        *,
        poll_seconds: float,
        tokenizer_fingerprint: bytes,
    ) -> None:
        self.model_name = model_name
        self._poll_seconds = poll_seconds
        self._tokenizer_fingerprint = tokenizer_fingerprint
        roles = ProcessRole.PROCESS_ROLE_DECODE, ProcessRole.PROCESS_ROLE_PREFILL
        self.workers = [
            Worker(address, role, open_channel(address))
            for role, addresses in zip(roles, (decode, prefill), strict=True)
            for address in addresses
        ]
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

    async def run(self) -> None:
        """Looks at every worker until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._poll_seconds)

    async def look(self) -> None:
        """Looks at every worker once, at the same time."""
        await asyncio.gather(*(self._look_at(worker) for worker in self.workers))
        # Who answered before a decode worker that sets another kind was held against the old one.
        for worker in self.workers:
            if worker.detail.startswith(_TO_JUDGE_AGAIN) and worker.info is not None:
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
        except Exception as error:  # noqa: BLE001 - whatever it was, only this worker is left out
            self._cannot_be_judged(worker, error)
        else:
            self._judge(worker, info, answer.status)

    def _set_detail(self, worker: Worker, detail: str) -> None:
        # How long it took differs each time and is no news.
        if worker.detail.partition(" after ")[0] != detail.partition(" after ")[0]:
            self._log.info("worker", worker_id=worker.worker_id, address=worker.address, detail=detail or "ready")
        worker.detail = detail

    def _judge(self, worker: Worker, info: worker_pb2.GetInfoResponse, status: ProcessStatus) -> None:
        try:
            if worker.info is not None and worker.info.worker.incarnation != info.worker.incarnation:
                worker.resident.clear()
            worker.info, worker.status = info, status
            self._set_detail(worker, self._verdict(worker, info, status))
        except Exception as error:  # noqa: BLE001 - whatever it was, only this worker is left out
            self._cannot_be_judged(worker, error)

    def _cannot_be_judged(self, worker: Worker, error: Exception) -> None:
        self._log.error("look_failed", address=worker.address, exc_info=error)
        self._set_detail(worker, f"cannot be judged: {type(error).__name__}: {error}")

    def _verdict(self, worker: Worker, info: worker_pb2.GetInfoResponse, status: ProcessStatus) -> str:
        """Why a worker may not be used, or nothing."""
        if info.role != worker.role:
            return f"is a {enum_name(ProcessRole, info.role)}"
        if status.state != ProcessState.PROCESS_STATE_READY:
            return enum_name(ProcessState, status.state).removeprefix("PROCESS_STATE_").lower()
        for other in self.workers:
            if (
                other is not worker
                and other.usable
                and (other.role, other.worker_id) == (worker.role, worker.worker_id)
            ):
                return f"{_SAME_ID}{other.address}"
        if info.tokenizer_fingerprint != self._tokenizer_fingerprint:
            return _OTHER_TOKENIZER
        return self._differs(worker, info)

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
                return f"{_DIFFERS}{field_.name}"
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
