"""A decode worker, wired: model, pool, engine, receiver, gRPC."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path

import grpc
import torch
from transformers import AutoTokenizer

from decode_worker.arena import Arena
from decode_worker.attention import base
from decode_worker.engine import Engine
from decode_worker.opening import Opener
from decode_worker.pool import Pool
from decode_worker.receiver import Receiver
from decode_worker.runner import LogitTrace, Runner
from decode_worker.service import DecodeService
from decode_worker.settings import DecodeSettings
from drystone.v1.operations_pb2 import ProcessRole, ProcessState
from shared.engine import served_model
from shared.engine.served_model import ServedModel
from shared.internal.v1 import decode_pb2, worker_pb2
from shared.internal.v1.common_pb2 import KvEndpoint, WorkerIdentity
from shared.internal.v1.decode_pb2_grpc import add_DecodeServicer_to_server
from shared.internal.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from shared.metrics import Metrics
from shared.rpc.server import RpcServer
from shared.rpc.worker_service import WorkerService
from shared.runtime import cancelled, host_name
from shared.transfer.compatibility import compatibility_of


class DecodeApp:
    """Owns everything of one decode worker. Loads the model when made; serves between start and stop.

    Args:
        settings: Typed settings.
        folder: Local model folder.
        name: Name that clients ask for.
        trace: For the exactness gate: sees the logits of every row.
    """

    def __init__(self, settings: DecodeSettings, folder: Path, name: str, trace: LogitTrace | None = None) -> None:
        self._settings = settings
        self.model: ServedModel = served_model.load(
            folder,
            name=name,
            dtype=settings.dtype,
            device=settings.device,
            context_tokens=settings.context_tokens,
        )
        self.identity = WorkerIdentity(worker_id=settings.worker_id, incarnation=secrets.randbits(63) | 1)
        try:
            arena = Arena(self.model.geometry.shape, settings.pool_bytes, torch.device(settings.device))
        except RuntimeError as error:
            raise ValueError(f"pool_bytes: {settings.pool_bytes} bytes cannot be had on {settings.device}") from error
        self.pool = Pool(arena, self.identity)
        attention = base.make(settings.attention, self.model, arena)
        self._endpoint = KvEndpoint(host=host_name())
        self.engine = Engine(
            self.model,
            self.pool,
            Runner(self.model, attention, trace),
            max_waiting=settings.max_waiting,
            endpoint=self._endpoint,
            stall_seconds=settings.fetch_stall_seconds,
        )
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> dict[str, str]:
        """Binds, serves, and returns addresses."""
        self.receiver = Receiver(
            self.pool.fetches,
            compatibility_of(self.model),
            self.model.geometry.shape,
            view=lambda fetch: self.pool.arena.bytes_of(fetch.extent),
            committed=lambda fetch, size: self.engine.committed(fetch, shipped_bytes=size),
        )
        self._endpoint.zmq_address = self.receiver.bind(self._settings.kv_host, self._settings.kv_port)
        tokenizer = AutoTokenizer.from_pretrained(self.model.folder).backend_tokenizer
        opener = Opener(self.model, tokenizer, self.identity.incarnation, self._settings.default_timeout_seconds)
        decode = DecodeService(self.engine, opener)
        self._worker = WorkerService(
            self.identity,
            ProcessRole.PROCESS_ROLE_DECODE,
            self.model,
            self.figures,
            capacity_bytes=self.pool.arena.capacity_bytes,
            endpoint=self._endpoint,
        )

        def register(server: grpc.aio.Server) -> None:
            add_DecodeServicer_to_server(decode, server)
            add_WorkerServicer_to_server(self._worker, server)

        services = [
            decode_pb2.DESCRIPTOR.services_by_name["Decode"].full_name,
            worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name,
        ]
        self.server = RpcServer(self._settings, register, services)
        self._worker.address = await self.server.start()
        self.tasks = [
            asyncio.create_task(run) for run in (self.engine.run(), self.engine.watch_fetches(), self.receiver.run())
        ]
        self._metrics = Metrics(self.figures)
        self._metrics.serve(self._settings.host, self._settings.metrics_port)
        await self.server.set_serving(serving=True)
        return {
            "role": "decode",
            "worker_id": self.identity.worker_id,
            "grpc_address": self.server.address,
            "kv_address": self._endpoint.zmq_address,
        }

    async def stop(self, grace_seconds: float) -> None:
        """Running requests may end within the grace; then everything is released."""
        if self.tasks:
            self._worker.state = ProcessState.PROCESS_STATE_DRAINING
            await self.server.stop(grace_seconds)
            for task in self.tasks:
                await cancelled(task)
            self._metrics.close()
            self.receiver.close()

    def figures(self) -> Mapping[str, float]:
        """Figures for the status registry."""
        pool, record = self.pool, self.pool.arena.shape.record_bytes
        return {
            "requests_running": self.engine.running,
            "requests_waiting": self.engine.waiting,
            "requests_total": self.engine.requests_total,
            "requests_failed_total": self.engine.failed_total,
            "pool_capacity_bytes": pool.arena.capacity_bytes,
            "pool_used_bytes": pool.arena.used_bytes,
            "pool_pinned_bytes": pool.blocks.pinned_records * record,
            "blocks_resident": len(pool.blocks),
            "reservations_open": len(pool.fetches),
            "evictions_total": pool.blocks.evictions,
            "tokens_generated_total": self.engine.tokens_total,
            "steps_total": self.engine.steps_total,
            "received_bytes_total": self.receiver.received_bytes,
            "chunks_refused_total": self.receiver.refused_total,
        }
