"""A gateway, wired: workers, prompt planning, public services."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import grpc

from drystone.v1 import generation_pb2, operations_pb2
from drystone.v1.generation_pb2_grpc import add_GenerationServicer_to_server
from drystone.v1.operations_pb2_grpc import add_OperationsServicer_to_server
from gateway.block_life import BlockLife
from gateway.cluster import Cluster
from gateway.fetcher import FetchPolicy
from gateway.operations import OperationsService
from gateway.planning import Planning
from gateway.prompt import PromptLimits, PromptTokenizer, TemplateDefaults
from gateway.service import GenerationService
from gateway.settings import GatewaySettings
from gateway.tenants import Tenants
from gateway.warming import Warming
from shared import logs
from shared.metrics import Metrics
from shared.model.fingerprint import tokenizer_fingerprint
from shared.rpc.server import RpcServer
from shared.runtime import cancelled, host_name
from shared.tracing import Tracing

_READINESS_SECONDS = 0.2


_HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")


class GatewayApp:
    """Owns everything of one gateway. Serves between start and stop.

    Args:
        settings: Typed settings.
        folder: Local model folder, of which only the tokenizer is read.
        name: Name that clients ask for.
    """

    def __init__(self, settings: GatewaySettings, folder: Path, name: str) -> None:
        self._settings = settings
        self._tokenizer = PromptTokenizer(folder)
        self._tokenizer_fingerprint = tokenizer_fingerprint(folder)
        self._name = name
        self._defaults = TemplateDefaults(
            name=settings.template,
            bos=settings.bos,
            block_attention_prefix=settings.block_attention_prefix,
            special_tokens_in_documents=settings.special_tokens_in_documents,
        )
        self._defaults.check(self._tokenizer)
        self.tasks: list[asyncio.Task[None]] = []
        self._log = logs.get("gateway")

    async def start(self) -> dict[str, str]:
        """Serves; ready once a decode worker is. Returns addresses."""
        settings = self._settings
        self.cluster = Cluster(
            self._name,
            settings.decode_workers,
            settings.prefill_workers,
            poll_seconds=settings.poll_seconds,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
        )
        self._metrics = Metrics(self._figures, _HISTOGRAMS)
        gateway_id = f"gateway@{host_name()}"
        self._tracing = Tracing("gateway", gateway_id, settings.otlp_endpoint, settings.trace_sample_ratio)
        tenants = Tenants(share_blocks=settings.share_blocks, secret=settings.tenant_secret.get_secret_value())
        planning = Planning(
            self.cluster,
            self._tokenizer,
            limits=PromptLimits(
                max_documents=settings.max_documents,
                max_blocks=settings.max_documents + 1,
                max_messages=settings.max_documents,
                max_document_bytes=settings.max_document_bytes,
                max_message_bytes=settings.max_document_bytes,
                max_question_bytes=settings.max_document_bytes,
                max_instructions_bytes=settings.max_document_bytes,
                max_stop_strings=settings.max_stop_strings,
            ),
            defaults=self._defaults,
            tenants=tenants,
            default_timeout_seconds=settings.default_timeout_seconds,
        )
        self.generation = GenerationService(
            self.cluster,
            planning,
            self._metrics,
            warming=Warming(
                self.cluster,
                planning,
                tenants,
                concurrency=settings.warm_concurrency,
                max_documents=settings.max_warm_documents,
                timeout_seconds=settings.warm_timeout_seconds,
            ),
            blocks=BlockLife(self.cluster, tenants),
            policy=FetchPolicy(settings.fetch_attempts, settings.fetch_timeout_seconds),
            max_requests=settings.max_requests,
            tracing=self._tracing,
        )
        self._operations = OperationsService(self.cluster, self.generation, gateway_id)

        def register(server: grpc.aio.Server) -> None:
            add_GenerationServicer_to_server(self.generation, server)
            add_OperationsServicer_to_server(self._operations, server)

        services = [
            generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name,
            operations_pb2.DESCRIPTOR.services_by_name["Operations"].full_name,
        ]
        self.server = RpcServer(settings, register, services)
        await self.cluster.look()
        self._operations.address = await self.server.start()
        self._metrics.serve(settings.host, settings.metrics_port)
        self.tasks = [asyncio.create_task(self.cluster.run()), asyncio.create_task(self._tell_readiness())]
        return {"role": "gateway", "worker_id": "gateway", "grpc_address": self.server.address}

    async def _tell_readiness(self) -> None:
        serving: bool | None = None
        while True:
            now = bool(self.cluster.decode_workers)
            if now != serving:
                serving = now
                await self.server.set_serving(serving=now)
                self._log.info("readiness", serving=now)
            await asyncio.sleep(_READINESS_SECONDS)

    async def stop(self, grace_seconds: float) -> None:
        """Running requests may end within the grace; then everything is released."""
        if self.tasks:
            self._operations.state = operations_pb2.ProcessState.PROCESS_STATE_DRAINING
            for task in self.tasks:
                await cancelled(task)
            await self.server.stop(grace_seconds)
            await self.cluster.close()
            self._metrics.close()
            await asyncio.to_thread(self._tracing.close)

    def _figures(self) -> Mapping[str, float]:
        return self.generation.figures()
