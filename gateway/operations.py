"""drystone.v1.Operations: state of the cluster."""

from __future__ import annotations

import time
from typing import Any

import grpc

from drystone.v1 import operations_pb2 as v1
from drystone.v1.operations_pb2_grpc import OperationsServicer
from gateway.cluster import Cluster
from gateway.service import GenerationService
from shared.errors import not_in_this_version
from shared.status import status_values
from shared.version import VERSION

Context = grpc.aio.ServicerContext[Any, Any]


class OperationsService(OperationsServicer):
    """Answers operators."""

    def __init__(self, cluster: Cluster, generation: GenerationService, gateway_id: str) -> None:
        self._cluster = cluster
        self._generation = generation
        self._gateway_id = gateway_id
        self._started = time.monotonic()
        self.address = ""
        self.state = v1.ProcessState.PROCESS_STATE_READY

    async def GetStatus(self, request: v1.GetStatusRequest, context: Context) -> v1.GetStatusResponse:
        """The gateway first, then every worker, looked at now."""
        await self._cluster.look()
        own = v1.ProcessStatus(
            worker_id=self._gateway_id,
            role=v1.ProcessRole.PROCESS_ROLE_GATEWAY,
            state=self.state,
            address=self.address,
            model=self._cluster.model_name,
            version=VERSION,
            uptime_seconds=time.monotonic() - self._started,
            values=status_values(**self._generation.figures()),
        )
        return v1.GetStatusResponse(processes=[own, *self._cluster.statuses()])

    async def Explain(self, request: v1.ExplainRequest, context: Context) -> v1.ExplainResponse:
        """Not in this version."""
        raise not_in_this_version("Explain")
