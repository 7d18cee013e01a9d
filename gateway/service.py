"""drystone.v1.Generation: admit → validate → plan → key → relay."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.generation_pb2_grpc import GenerationServicer
from drystone.v1.prompt_pb2 import Attention
from gateway.accounting import planned_blocks
from gateway.cluster import Cluster
from gateway.fetcher import token_ids_of
from gateway.prompt import (
    PromptLimits,
    PromptPlanner,
    PromptTokenizer,
    TemplateDefaults,
    block_keys_in,
    filled_sampling,
    validate,
)
from gateway.relay import FetchPolicy, relay
from gateway.ticket import Ticket
from shared import logs
from shared.errors import DrystoneError, Reason, not_in_this_version
from shared.internal.v1.common_pb2 import BlockRef
from shared.metrics import Metrics

Context = grpc.aio.ServicerContext[Any, Any]
_SEED_BITS = 63


class GenerationService(GenerationServicer):
    """Answers the public API.

    Args:
        cluster: The workers.
        tokenizer: Of the served model.
        metrics: Observes latencies.
        limits: Upper bounds of a request.
        defaults: Template defaults.
        policy: How hard fetches are tried.
        max_requests: Requests served at once.
        default_timeout_seconds: Time of a request whose caller set none.
    """

    def __init__(
        self,
        cluster: Cluster,
        tokenizer: PromptTokenizer,
        metrics: Metrics,
        *,
        limits: PromptLimits,
        defaults: TemplateDefaults,
        policy: FetchPolicy,
        max_requests: int,
        default_timeout_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._limits = limits
        self._defaults = defaults
        self._policy = policy
        self._max_requests = max_requests
        self._default_timeout = default_timeout_seconds
        self._log = logs.get("generation")
        self.running = self.total = self.failed = 0

    async def Generate(self, request: v1.GenerateRequest, context: Context) -> AsyncIterator[v1.GenerateResponse]:
        """Answers one prompt as a stream of events."""
        arrived = time.monotonic()
        metadata = dict(context.invocation_metadata() or ())
        traceparent = str(metadata.get("traceparent") or logs.new_traceparent())
        request_id = request.request_id or f"req-{secrets.token_hex(8)}"
        self.total += 1
        self._admit()
        self.running += 1
        try:
            with logs.request_scope(request_id, traceparent):
                ticket = await self._ticket(request, request_id, traceparent, arrived, context.time_remaining())
                yield self._started(ticket)
                # Closed here and not by the garbage collector: leaving must cancel at once.
                async with contextlib.aclosing(relay(ticket, self._cluster, self._policy, self._metrics)) as events:
                    async for event in events:
                        yield event
                seconds = time.monotonic() - arrived
                self._metrics.observe("e2e_request_latency_seconds", seconds)
                self._log.info("completed", seconds=round(seconds, 3))
        except DrystoneError as error:
            self.failed += 1
            self._log.info("failed", request_id=request_id, reason=error.reason, detail=error.message)
            raise
        finally:
            self.running -= 1

    def figures(self) -> Mapping[str, float]:
        """Figures for the status registry."""
        return {
            "requests_running": self.running,
            "requests_total": self.total,
            "requests_failed_total": self.failed,
        }

    def _admit(self) -> None:
        if self.running >= self._max_requests:
            raise DrystoneError(
                Reason.TOO_MANY_REQUESTS,
                f"{self.running} requests run on this gateway; limit {self._max_requests}",
                metadata={"limit": str(self._max_requests)},
                retry_after_ms=1000,
            )

    async def _ticket(
        self, request: v1.GenerateRequest, request_id: str, traceparent: str, arrived: float, left: float | None
    ) -> Ticket:
        validate(request, self._limits)
        self._check_model(request.model)
        known = await token_ids_of(self._cluster, block_keys_in(request))
        planner = self.planner()
        plan = await asyncio.to_thread(planner.plan, request, known)
        keys = self._cluster.key_space()
        refs = tuple(
            BlockRef(key=keys.key(block.token_ids), token_ids=block.token_ids, store=block.store)
            for block in plan.blocks
        )
        seed = request.sampling.seed if request.sampling.HasField("seed") else secrets.randbits(_SEED_BITS)
        asked = [seconds for seconds in (left, request.timeout_ms / 1e3) if seconds]
        timeout = min(asked, default=self._default_timeout)
        return Ticket(
            request_id=request_id,
            traceparent=traceparent,
            plan=plan,
            refs=refs,
            sampling=filled_sampling(request, seed),
            arrived=arrived,
            planned=time.monotonic(),
            deadline=arrived + timeout,
            priority=request.priority,
        )

    def planner(self) -> PromptPlanner:
        """A planner for the context that the decode workers serve now."""
        return PromptPlanner(
            self._tokenizer,
            context_tokens=self._cluster.info.context_tokens,
            limits=self._limits,
            defaults=self._defaults,
        )

    def _check_model(self, name: str) -> None:
        if name not in ("", self._cluster.model_name):
            raise DrystoneError(
                Reason.UNKNOWN_MODEL,
                f"model: no worker serves {name!r}; this gateway serves {self._cluster.model_name!r}",
                field="model",
                metadata={"value": name, "served": self._cluster.model_name},
            )

    def _started(self, ticket: Ticket) -> v1.GenerateResponse:
        return v1.GenerateResponse(
            started=v1.Started(
                request_id=ticket.request_id,
                model=self._cluster.model_name,
                model_fingerprint=self._cluster.info.compatibility.model_fingerprint.hex(),
                seed=ticket.sampling.seed,
                prompt_tokens=ticket.plan.prompt_tokens,
                truncated_tokens=ticket.plan.truncated_tokens,
                dropped_documents=ticket.plan.dropped_documents,
                blocks=planned_blocks(ticket),
                attention=Attention.ValueType(ticket.plan.attention),
            )
        )

    async def GetModel(self, request: v1.GetModelRequest, context: Context) -> v1.GetModelResponse:
        """What the served model is and what it takes."""
        self._check_model(request.model)
        info = self._cluster.info
        return v1.GetModelResponse(
            model=self._cluster.model_name,
            model_fingerprint=info.compatibility.model_fingerprint.hex(),
            dtype=info.compatibility.dtype,
            context_tokens=info.context_tokens,
            kv_bytes_per_token=info.kv_bytes_per_token,
            template=self.planner().template_name,
            sliding_window_layers=info.sliding_window_layers,
        )

    async def Warm(self, request: v1.WarmRequest, context: Context) -> AsyncIterator[v1.WarmResponse]:
        """Not in this version."""
        raise not_in_this_version("Warm")
        yield v1.WarmResponse()  # makes this a generator, as gRPC expects

    async def DescribeBlocks(self, request: v1.DescribeBlocksRequest, context: Context) -> v1.DescribeBlocksResponse:
        """Not in this version."""
        raise not_in_this_version("DescribeBlocks")

    async def PinBlocks(self, request: v1.PinBlocksRequest, context: Context) -> v1.PinBlocksResponse:
        """Not in this version."""
        raise not_in_this_version("PinBlocks")

    async def DeleteBlocks(self, request: v1.DeleteBlocksRequest, context: Context) -> v1.DeleteBlocksResponse:
        """Not in this version."""
        raise not_in_this_version("DeleteBlocks")
