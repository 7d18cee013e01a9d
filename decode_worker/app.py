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
from decode_worker.attention.native import NativeAttention
from decode_worker.budget import pool_bytes
from decode_worker.engine import Engine, waiting_for_blocks
from decode_worker.eviction import POLICIES
from decode_worker.fused import FusedDecoder
from decode_worker.observer import HISTOGRAMS, Observer
from decode_worker.opening import Opener
from decode_worker.pool import Pool
from decode_worker.receiving.listener import Folder, Listener
from decode_worker.receiving.receiver import Receiver
from decode_worker.runner import LogitTrace, Runner
from decode_worker.sampling import Sampler
from decode_worker.scheduler import StepBudget
from decode_worker.service import DecodeService
from decode_worker.settings import DecodeSettings
from decode_worker.tail import SEGMENT_TOKENS
from drystone.v1.operations_pb2 import ProcessRole, ProcessState
from shared import logs
from shared.engine import served_model
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.internal.v1 import decode_pb2, worker_pb2
from shared.internal.v1.common_pb2 import KvEndpoint, WorkerIdentity
from shared.internal.v1.decode_pb2_grpc import add_DecodeServicer_to_server
from shared.internal.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from shared.metrics import Metrics
from shared.rpc.server import RpcServer
from shared.rpc.worker_service import WorkerService
from shared.runtime import cancelled, host_name
from shared.transfer.choice import own_end
from shared.transfer.compatibility import compatibility_of
from shared.transfer.curve import check_bind, server_security

_COUNTERS = ("requests_ended", "kv_chunks_refused", "kv_connections_denied")


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
        check_bind(settings, settings.kv_host)
        self._security = server_security(settings, lambda reason: self._metrics.count("kv_connections_denied", reason))
        self.model: ServedModel = served_model.load(
            folder,
            name=name,
            dtype=settings.dtype,
            device=settings.device,
            context_tokens=settings.context_tokens,
        )
        self.identity = WorkerIdentity(worker_id=settings.worker_id, incarnation=secrets.randbits(63) | 1)
        device = torch.device(settings.device)
        size = pool_bytes(settings.pool_bytes, settings.pool_share, device)
        least = self.model.geometry.shape.extent_bytes(2 * SEGMENT_TOKENS)
        if size < least:
            raise ValueError(
                f"pool_bytes: {size} bytes is too little; {least} hold a passage and a tail of 64 tokens each"
            )
        try:
            arena = Arena(self.model.geometry.shape, size, device)
        except RuntimeError as error:
            raise ValueError(f"pool_bytes: {size} bytes cannot be had on {settings.device}") from error
        self.pool = Pool(arena, self.identity, POLICIES[settings.eviction]())
        self._tokenizer = AutoTokenizer.from_pretrained(self.model.folder).backend_tokenizer
        self._sampler = Sampler(self._tokenizer, self.model.vocabulary_size)
        self._metrics = Metrics(self.figures, HISTOGRAMS, _COUNTERS)
        self.observer = Observer(self._metrics)
        attention = base.make(settings.attention, self.model, arena)
        fused, native = None, None
        if isinstance(attention, NativeAttention):
            fused = FusedDecoder.prove(self.model, arena, attention.kernel)
            native = NativeEncoder.prove(self.model, attention.kernel) if fused is not None else None
        logs.get("engine").info("engine", attention=attention.name, pool_bytes=size, eviction=settings.eviction)
        self._endpoint = KvEndpoint(host=host_name())
        self.engine = Engine(
            self.model,
            self.pool,
            Runner(self.model, attention, self._sampler, trace, fused),
            endpoint=self._endpoint,
            max_waiting=settings.max_waiting,
            max_samples=settings.max_samples,
            budget=StepBudget(settings.step_tokens, settings.mixed_step_tokens),
            stall_seconds=settings.fetch_stall_seconds,
            observer=self.observer,
            native=native,
        )
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> dict[str, str]:
        """Binds, serves, and returns addresses."""
        self.receiver = Receiver(
            self.pool.fetches,
            compatibility_of(self.model),
            self.model.geometry.shape,
            view=lambda landing: self.pool.arena.bytes_of(landing.extent),
            committed=lambda fetch, size: self.engine.committed(fetch, shipped_bytes=size),
            budget_bytes=self._settings.kv_receive_bytes,
            on_refused=lambda reason: self._metrics.count("kv_chunks_refused", reason),
            security=self._security,
            end=own_end(self._settings.kv_transport, self._settings.device),
        )
        self._listen()
        opener = Opener(
            self.model,
            self._tokenizer,
            self._sampler,
            self.identity.incarnation,
            self._settings.default_timeout_seconds,
            self._settings.max_samples,
        )
        decode = DecodeService(self.engine, opener)
        self._worker = WorkerService(
            self.identity,
            ProcessRole.PROCESS_ROLE_DECODE,
            self.model,
            self.figures,
            capacity_bytes=self.pool.arena.capacity_bytes,
            endpoint=self._endpoint,
            pairs=self.receiver.pairs.statuses,
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
        self.tasks = [asyncio.create_task(run) for run in (self.engine.run(), self.engine.watch_fetches())]
        self._metrics.serve(self._settings.host, self._settings.metrics_port)
        await self.server.set_serving(serving=True)
        return {
            "role": "decode",
            "worker_id": self.identity.worker_id,
            "grpc_address": self.server.address,
            "kv_address": self._endpoint.zmq_address,
        }

    def _listen(self) -> None:
        """Takes KV over TCP, under CURVE where there are keys, and over a Unix-domain socket from this host."""
        settings, shape, context = self._settings, self.model.geometry.shape, self.receiver.context
        try:
            remote = Listener(context, shape, f"tcp://{settings.kv_host}:{settings.kv_port}", self._security)
        except OSError:
            self.receiver.close()
            raise
        self._folder = Folder()
        local = Listener(context, shape, self._folder.address)
        for listener in (remote, local):
            self.receiver.listen(listener)
        self._endpoint.zmq_address, self._endpoint.ipc_address = remote.address, local.address
        if self._security is not None:
            self._endpoint.curve_public_key = self._security.public_key
        self.receiver.start()

    async def stop(self, grace_seconds: float) -> None:
        """Running requests may end within the grace; then everything is released."""
        if self.tasks:
            self._worker.state = ProcessState.PROCESS_STATE_DRAINING
            await self.server.stop(grace_seconds)
            for task in self.tasks:
                await cancelled(task)
            self._metrics.close()
            self.receiver.close()
            self._folder.close()

    def figures(self) -> Mapping[str, float]:
        """Figures for the status registry."""
        pool, lifecycle, record = self.pool, self.engine.lifecycle, self.pool.arena.shape.record_bytes
        return {
            "num_requests_running": len(lifecycle.running),
            "num_requests_waiting": len(lifecycle.waiting),
            "num_requests_waiting_for_blocks": waiting_for_blocks(lifecycle.running),
            "requests_total": lifecycle.requests_total,
            "requests_failed_total": lifecycle.failed_total,
            "pool_capacity_bytes": pool.arena.capacity_bytes,
            "pool_used_bytes": pool.arena.used_bytes,
            "pool_pinned_bytes": pool.blocks.pinned_records * record,
            "pool_longest_free_bytes": pool.arena.longest_free_records * record,
            "pool_moved_bytes_total": pool.arena.moved_bytes,
            "kv_cache_usage_ratio": pool.arena.used_bytes / max(pool.arena.capacity_bytes, 1),
            "blocks_resident": len(pool.blocks) - len(pool.sealed),
            "tail_segments_sealed": len(pool.sealed),
            "reservations_open": len(pool.fetches),
            "evictions_total": pool.blocks.evictions,
            "prefix_cache_queries_total": pool.queried_tokens,
            "prefix_cache_hits_total": pool.hit_tokens,
            "prompt_tokens_total": self.observer.prompt_tokens_total,
            "generation_tokens_total": self.engine.answering.tokens_total,
            "steps_total": self.engine.steps_total,
            "integrity_failures_total": self.engine.integrity_failures_total,
            "received_bytes_total": self.receiver.received_bytes,
            "chunks_refused_total": self.receiver.refused_total,
            "kv_pairs": len(self.receiver.pairs),
            "connections_denied_total": self.receiver.denied_total,
        }
