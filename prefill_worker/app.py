"""A prefill worker, wired: model, encoder, store, shipper, gRPC."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path

import grpc

from drystone.v1.operations_pb2 import ProcessRole, ProcessState
from prefill_worker.encoder import Encoder
from prefill_worker.service import PrefillService
from prefill_worker.settings import PrefillSettings
from prefill_worker.shipper import Shipper
from prefill_worker.store import RamStore
from shared.engine import served_model
from shared.engine.native import builder
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.internal.v1 import prefill_pb2, worker_pb2
from shared.internal.v1.common_pb2 import WorkerIdentity
from shared.internal.v1.prefill_pb2_grpc import add_PrefillServicer_to_server
from shared.internal.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from shared.metrics import Metrics
from shared.model.catalog import cache_dir
from shared.rpc.server import RpcServer
from shared.rpc.worker_service import WorkerService
from shared.runtime import cancelled
from shared.transfer.compatibility import compatibility_of


class PrefillApp:
    """Owns everything of one prefill worker. Loads the model when made; serves between start and stop.

    Args:
        settings: Typed settings.
        folder: Local model folder.
        name: Name that clients ask for.
    """

    def __init__(self, settings: PrefillSettings, folder: Path, name: str) -> None:
        self._settings = settings
        self.model: ServedModel = served_model.load(
            folder,
            name=name,
            dtype=settings.dtype,
            device=settings.device,
            context_tokens=settings.context_tokens,
        )
        self.identity = WorkerIdentity(worker_id=settings.worker_id, incarnation=secrets.randbits(63) | 1)
        kernel = builder.load(cache_dir() / "kernels") if settings.native_encoder and settings.device == "cpu" else None
        self._native = NativeEncoder.prove(self.model, kernel) if kernel is not None else None
        self.store = RamStore(settings.store_bytes)
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> dict[str, str]:
        """Serves; returns addresses."""
        settings = self._settings
        shape = self.model.geometry.shape
        self.encoder = Encoder(
            self.model, self.store, settings.max_queued_blocks, settings.max_unshipped_bytes, self._native
        )
        self.shipper = Shipper(self.identity, compatibility_of(self.model), shape, settings.ship_timeout_seconds)
        prefill = PrefillService(self.model, self.store, self.encoder, self.shipper, settings.default_timeout_seconds)
        self._worker = WorkerService(
            self.identity,
            ProcessRole.PROCESS_ROLE_PREFILL,
            self.model,
            self.figures,
            capacity_bytes=self.store.budget_bytes,
        )

        def register(server: grpc.aio.Server) -> None:
            add_PrefillServicer_to_server(prefill, server)
            add_WorkerServicer_to_server(self._worker, server)

        services = [
            prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name,
            worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name,
        ]
        self.server = RpcServer(settings, register, services)
        self._worker.address = await self.server.start()
        self.tasks = [asyncio.create_task(self.encoder.run())]
        self._metrics = Metrics(self.figures)
        self._metrics.serve(settings.host, settings.metrics_port)
        await self.server.set_serving(serving=True)
        return {"role": "prefill", "worker_id": self.identity.worker_id, "grpc_address": self.server.address}

    async def stop(self, grace_seconds: float) -> None:
        """Running jobs may end within the grace; then everything is released."""
        if self.tasks:
            self._worker.state = ProcessState.PROCESS_STATE_DRAINING
            await self.server.stop(grace_seconds)
            for task in self.tasks:
                await cancelled(task)
            self._metrics.close()
            await self.shipper.close()

    def figures(self) -> Mapping[str, float]:
        """Figures for the status registry."""
        return {
            "store_capacity_bytes": self.store.budget_bytes,
            "store_used_bytes": self.store.used_bytes,
            "blocks_stored": len(self.store),
            "encode_queue_blocks": self.encoder.queued,
            "blocks_encoded_total": self.encoder.blocks_total,
            "tokens_encoded_total": self.encoder.tokens_total,
            "encode_seconds_total": self.encoder.seconds_total,
            "shipped_bytes_total": self.shipper.shipped_bytes,
            "chunks_resent_total": self.shipper.resent_total,
        }
