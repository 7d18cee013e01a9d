"""A prefill worker, wired: model, encoder, store, shipper, gRPC."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from pathlib import Path

import grpc

from drystone.v1.operations_pb2 import ProcessRole, ProcessState
from prefill_worker.encoder import Encoder
from prefill_worker.figures import figures
from prefill_worker.holdings import Holdings
from prefill_worker.jobs import Jobs
from prefill_worker.opening import Opening, Places
from prefill_worker.service import PrefillService
from prefill_worker.settings import PrefillSettings
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.outgoing import Shipped
from prefill_worker.transfer.shipper import Shipper
from shared import logs
from shared.engine import served_model
from shared.engine.native import builder
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError
from shared.internal.v1 import prefill_pb2, worker_pb2
from shared.internal.v1.common_pb2 import WorkerIdentity
from shared.internal.v1.prefill_pb2_grpc import add_PrefillServicer_to_server
from shared.internal.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from shared.metrics import Metrics
from shared.model.catalog import cache_dir
from shared.rpc.server import RpcServer
from shared.rpc.worker_service import WorkerService
from shared.runtime import cancelled
from shared.transfer.choice import own_end
from shared.transfer.compatibility import compatibility_of
from shared.transfer.curve import client_security

_HISTOGRAMS = (
    "encode_batch_tokens",
    "encode_time_seconds",
    "kv_transfer_seconds",
    "kv_transfer_bandwidth_bytes_per_second",
    "kv_credit_wait_seconds",
    *(f"{tier}_{work}_seconds" for tier in ("disk", "object") for work in ("read", "write")),
)
_COUNTERS = ("kv_transfers", "kv_chunks_resent", "kv_transport_fallbacks")


class PrefillApp:
    """Owns everything of one prefill worker. Loads the model when made; serves between start and stop.

    Args:
        settings: Typed settings.
        folder: Local model folder.
        name: Name that clients ask for.
    """

    def __init__(self, settings: PrefillSettings, folder: Path, name: str) -> None:
        self._settings = settings
        self._security = client_security(settings)
        self._places = Places.of(settings)
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
        self.tasks: list[asyncio.Task[None]] = []
        self._log = logs.get("prefill")

    async def start(self) -> dict[str, str]:
        """Serves; returns addresses."""
        settings = self._settings
        shape = self.model.geometry.shape
        self._metrics = Metrics(lambda: figures(self.holdings, self.encoder, self.shipper), _HISTOGRAMS, _COUNTERS)
        self.encoder = Encoder(
            self.model,
            self._keep,
            max_queued_blocks=settings.max_queued_blocks,
            max_queued_tokens=settings.max_queued_tokens,
            max_unshipped_bytes=settings.max_unshipped_bytes,
            batch_tokens=settings.batch_tokens,
            native=self._native,
            on_batch=self._batch_done,
        )
        opening = Opening(settings, self._places, self.model, self.encoder.encode_seconds, self._metrics)
        keys = self.model.key_space()
        self.holdings = Holdings(opening.store(), opening.records(), self.encoder, keys, shape)
        self.shipper = Shipper(
            self.identity,
            compatibility_of(self.model),
            shape,
            settings.ship_timeout_seconds,
            security=self._security,
            on_end=self._shipping_ended,
            end=own_end(settings.kv_transport, settings.device),
            on_fallback=lambda reason: self._metrics.count("kv_transport_fallbacks", reason),
        )
        jobs = Jobs(self.holdings, self.encoder, self.shipper, self.model.vocabulary_size)
        prefill = PrefillService(self.model, jobs, self.holdings, settings.default_timeout_seconds)
        self._worker = WorkerService(
            self.identity,
            ProcessRole.PROCESS_ROLE_PREFILL,
            self.model,
            lambda: figures(self.holdings, self.encoder, self.shipper),
            capacity_bytes=settings.ram_bytes,
            pairs=self.shipper.pairs,
        )

        def register(server: grpc.aio.Server) -> None:
            add_PrefillServicer_to_server(prefill, server)
            add_WorkerServicer_to_server(self._worker, server)

        services = [
            prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name,
            worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name,
        ]
        self.server = RpcServer(settings, register, services)
        await self._open()
        try:
            return await self._serve()
        except BaseException:
            # Whoever tries again, here or in another process, finds folder and table free.
            await self._release(0.0)
            raise

    async def _serve(self) -> dict[str, str]:
        self._worker.address = await self.server.start()
        self.tasks = [
            asyncio.create_task(self.encoder.run(), name="encoder"),
            asyncio.create_task(self.holdings.store.run(), name="store"),
            asyncio.create_task(self._keep_records(), name="records"),
        ]
        self._metrics.serve(self._settings.host, self._settings.metrics_port)
        await self.server.set_serving(serving=True)
        return {"role": "prefill", "worker_id": self.identity.worker_id, "grpc_address": self.server.address}

    async def stop(self, grace_seconds: float) -> None:
        """Running jobs may end within the grace; then everything is released."""
        if self.tasks:
            self._worker.state = ProcessState.PROCESS_STATE_DRAINING
            await self._release(grace_seconds)

    async def _release(self, grace_seconds: float) -> None:
        """Stops what runs, the server first, then lets go of tiers and records, begun or not."""
        await self.server.stop(grace_seconds)
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            await cancelled(task)
        self._metrics.close()
        await self.shipper.close()
        await self.holdings.store.close(grace_seconds)
        await self.holdings.records.close()

    async def _open(self) -> None:
        """Opens records and tiers; what is pinned stays pinned from the first moment."""
        await self.holdings.records.open()
        try:
            self.holdings.store.restore_pins(await self.holdings.records.pinned_keys())
            await self.holdings.store.start()
        except BaseException:
            await self.holdings.records.close()
            raise

    async def _keep_records(self) -> None:
        """Lets go of what has expired, and exchanges records with the mirror, until cancelled."""
        refreshed = -math.inf
        while True:
            try:
                await self.holdings.expire()
                if time.monotonic() - refreshed > self._settings.object_refresh_seconds:
                    refreshed = time.monotonic()
                    await self.holdings.records.refresh()
            except DrystoneError as error:  # the next round may succeed; requests go on without it
                self._log.warning("records_not_swept", reason=error.reason, detail=error.message)
            except Exception as defect:  # noqa: BLE001 - one record or object must not end the worker, again and again
                self.holdings.records.figures.table_failures += 1
                self._log.error("records_not_swept", exc_info=defect)
            await asyncio.sleep(self._settings.sweep_seconds)

    def _keep(self, block: StoredBlock) -> None:
        self.holdings.store.put(block)

    def _shipping_ended(self, outcome: str, shipped: Shipped | None) -> None:
        self._metrics.count("kv_transfers", outcome)
        if shipped is not None:
            self._metrics.observe("kv_transfer_seconds", shipped.seconds)
            self._metrics.observe("kv_credit_wait_seconds", shipped.credit_wait_seconds)
            self._metrics.observe("kv_transfer_bandwidth_bytes_per_second", shipped.bytes / max(shipped.seconds, 1e-9))
            for reason, times in shipped.resent.items():
                self._metrics.count("kv_chunks_resent", reason, times)

    def _batch_done(self, tokens: int, seconds: float) -> None:
        self._metrics.observe("encode_batch_tokens", tokens)
        self._metrics.observe("encode_time_seconds", seconds)
