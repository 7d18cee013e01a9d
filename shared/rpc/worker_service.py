"""drystone.internal.v1.Worker: who a worker is and how it does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

import grpc

from drystone.v1.operations_pb2 import PairStatus, ProcessRole, ProcessState, ProcessStatus
from shared.engine.served_model import ServedModel
from shared.errors import not_in_this_version
from shared.internal.v1 import worker_pb2 as pb
from shared.internal.v1.common_pb2 import KvEndpoint, WorkerIdentity
from shared.internal.v1.worker_pb2_grpc import WorkerServicer
from shared.model.fingerprint import tokenizer_fingerprint
from shared.status import status_values
from shared.transfer.compatibility import compatibility_of
from shared.version import VERSION

Context = grpc.aio.ServicerContext[object, object]


class WorkerService(WorkerServicer):
    """Answers for one worker.

    Args:
        figures: Gives the figures of `shared.status.FIGURES` that this worker has.
        capacity_bytes: Bytes of KV it can hold.
        endpoint: Where it takes KV; None for workers that do not.
        pairs: Gives its end of each pair that KV travels between.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        role: ProcessRole.ValueType,
        model: ServedModel,
        figures: Callable[[], Mapping[str, float]],
        *,
        capacity_bytes: int,
        endpoint: KvEndpoint | None = None,
        pairs: Callable[[], Iterable[PairStatus]] = tuple,
    ) -> None:
        self._identity = identity
        self._role = role
        self._model = model
        self._figures = figures
        self._capacity_bytes = capacity_bytes
        self._endpoint = endpoint
        self._pairs = pairs
        self._tokenizer_fingerprint = tokenizer_fingerprint(model.folder)
        self._started = time.monotonic()
        self.address = ""
        self.state = ProcessState.PROCESS_STATE_READY

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """Who the worker is."""
        return pb.GetInfoResponse(
            worker=self._identity,
            role=self._role,
            model=self._model.name,
            compatibility=compatibility_of(self._model),
            context_tokens=self._model.context_tokens,
            kv_bytes_per_token=self._model.geometry.shape.token_bytes,
            version=VERSION,
            kv_endpoint=self._endpoint,
            sliding_window_layers=self._model.geometry.windowed_layers,
            capacity_bytes=self._capacity_bytes,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            vocabulary_size=self._model.vocabulary_size,
        )

    async def WatchBlocks(
        self, request: pb.WatchBlocksRequest, context: Context
    ) -> AsyncIterator[pb.WatchBlocksResponse]:
        """Not in this version: gateways learn residency from their own requests."""
        raise not_in_this_version("WatchBlocks")
        yield pb.WatchBlocksResponse()  # makes this a generator, as gRPC expects

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """How it does."""
        return pb.GetStatusResponse(
            status=ProcessStatus(
                worker_id=self._identity.worker_id,
                role=self._role,
                state=self.state,
                address=self.address,
                incarnation=self._identity.incarnation,
                model=self._model.name,
                model_fingerprint=self._model.fingerprint.hex(),
                version=VERSION,
                uptime_seconds=time.monotonic() - self._started,
                values=status_values(**self._figures()),
                pairs=self._pairs(),
            )
        )
