"""Workers as a gateway sees them: real gRPC servers that say what a test wants them to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from drystone.v1.operations_pb2 import ProcessRole, ProcessState, ProcessStatus
from shared.internal.v1 import worker_pb2 as pb
from shared.internal.v1.common_pb2 import Compatibility, WorkerIdentity
from shared.internal.v1.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

TOKENIZER = b"t" * 32
DECODE, PREFILL = ProcessRole.PROCESS_ROLE_DECODE, ProcessRole.PROCESS_ROLE_PREFILL


def compatibility(**fields: object) -> Compatibility:
    """A compatibility with some fields set otherwise."""
    values = {
        "protocol_version": 2,
        "model_fingerprint": b"m" * 32,
        "dtype": "float32",
        "layout_version": 1,
        "rope_regime": b"r" * 32,
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 16,
    }
    return Compatibility(**{**values, **fields})  # type: ignore[arg-type] # fields of the right kind by name


class FakeWorker(WorkerServicer):
    """Answers GetInfo and GetStatus; every attribute may be changed while it serves."""

    def __init__(self, name: str, role: ProcessRole.ValueType) -> None:
        self.identity = WorkerIdentity(worker_id=name, incarnation=1)
        self.role = role
        self.compatibility = compatibility()
        self.state = ProcessState.PROCESS_STATE_READY
        self.tokenizer = TOKENIZER
        self.delay = 0.0
        self.address = ""

    async def GetInfo(  # noqa: N802 - gRPC's name
        self, request: pb.GetInfoRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.GetInfoResponse:
        del request, context
        await asyncio.sleep(self.delay)
        return pb.GetInfoResponse(
            worker=self.identity,
            role=self.role,
            compatibility=self.compatibility,
            context_tokens=100,
            tokenizer_fingerprint=self.tokenizer,
        )

    async def GetStatus(  # noqa: N802 - gRPC's name
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.GetStatusResponse:
        del request, context
        return pb.GetStatusResponse(status=ProcessStatus(worker_id=self.identity.worker_id, state=self.state))


@contextlib.asynccontextmanager
async def serving_workers(*workers: FakeWorker) -> AsyncIterator[None]:
    """Serves each on a port of its own."""
    servers = []
    for worker in workers:
        server = grpc.aio.server()
        add_WorkerServicer_to_server(worker, server)
        worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            await server.stop(0)
