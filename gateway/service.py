"""drystone.v1.Generation: admit → validate → plan → key → relay."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.generation_pb2_grpc import GenerationServicer
from gateway.block_life import BlockLife
from gateway.cluster import Cluster
from gateway.fetcher import FetchPolicy
from gateway.planning import Planning
from gateway.relay import relay
from gateway.warming import Warming
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.metrics import Metrics
from shared.tracing import NO_TRACING, Span, Tracing

# Calls beside Generate that run at once.
MAX_OPERATIONS = 64
Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(GenerationServicer):
    """Answers the public API.

    Args:
        cluster: The workers.
        planning: Makes tickets of requests.
        metrics: Observes latencies.
        warming: Encodes documents ahead.
        blocks: What operators do to blocks.
        policy: How hard fetches are tried.
        max_requests: Requests served at once.
        tracing: Makes their spans.
    """

    def __init__(
        self,
        cluster: Cluster,
        planning: Planning,
        metrics: Metrics,
        *,
        warming: Warming,
        blocks: BlockLife,
        policy: FetchPolicy,
        max_requests: int,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._cluster = cluster
        self._planning = planning
        self._metrics = metrics
        self._warming = warming
        self._blocks = blocks
        self._policy = policy
        self._max_requests = max_requests
        self._tracing = tracing
        self._log = logs.get("generation")
        self.running = self.total = self.failed = 0
        self._operations = 0

    async def Generate(self, request: v1.GenerateRequest, context: Context) -> AsyncIterator[v1.GenerateResponse]:
        """Answers one prompt as a stream of events."""
        arrived = time.monotonic()
        request_id = request.request_id or f"req-{secrets.token_hex(8)}"
        self.total += 1
        self._admit()
        self.running += 1
        try:
            with (
                self._tracing.span("generate", _traceparent(context), request_id=request_id) as span,
                logs.request_scope(request_id, span.traceparent),
            ):
                self._check_model(request.model)
                left = context.time_remaining()
                ticket = await self._planning.ticket(request, request_id, span.traceparent, arrived, left)
                span.event("planned", blocks=len(ticket.refs), prompt_tokens=ticket.plan.prompt_tokens)
                relayed = relay(ticket, self._cluster, self._policy, self._metrics, self._tracing)
                # Closed here and not by the garbage collector: leaving must cancel at once.
                async with contextlib.aclosing(relayed) as events:
                    async for event in events:
                        _note(span, event)
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
            "num_requests_running": self.running,
            "requests_total": self.total,
            "requests_failed_total": self.failed,
            "documents_warmed_total": self._warming.documents_total,
            "documents_failed_total": self._warming.documents_failed_total,
        }

    def _admit(self) -> None:
        if self.running >= self._max_requests:
            raise DrystoneError(
                Reason.TOO_MANY_REQUESTS,
                f"{self.running} requests run on this gateway; limit {self._max_requests}",
                metadata={"limit": str(self._max_requests)},
                retry_after_ms=1000,
            )

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """A place for a call that is no question: as many at once as may be, the next is refused."""
        if self._operations >= MAX_OPERATIONS:
            raise DrystoneError(
                Reason.TOO_MANY_REQUESTS,
                f"{self._operations} calls of warming and on blocks run on this gateway; limit {MAX_OPERATIONS}",
                metadata={"limit": str(MAX_OPERATIONS)},
                retry_after_ms=1000,
            )
        self._operations += 1
        try:
            yield
        finally:
            self._operations -= 1

    def _check_model(self, name: str) -> None:
        if name not in ("", self._cluster.model_name):
            raise DrystoneError(
                Reason.UNKNOWN_MODEL,
                f"model: no worker serves {name!r}; this gateway serves {self._cluster.model_name!r}",
                field="model",
                metadata={"value": name, "served": self._cluster.model_name},
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
            template=self._planning.planner(info).template_name,
            sliding_window_layers=info.sliding_window_layers,
        )

    async def Warm(self, request: v1.WarmRequest, context: Context) -> AsyncIterator[v1.WarmResponse]:
        """Encodes documents ahead of requests; leaving the stream cancels what is not done."""
        self._check_model(request.model)
        with self._operation(), self._tracing.span("warm", _traceparent(context)) as span:
            async with contextlib.aclosing(self._warming.warm(request, span.traceparent)) as events:
                async for event in events:
                    yield event

    async def DescribeBlocks(self, request: v1.DescribeBlocksRequest, context: Context) -> v1.DescribeBlocksResponse:
        """Where blocks live."""
        self._check_model(request.selector.model)
        with self._operation():
            return await self._blocks.describe(request)

    async def PinBlocks(self, request: v1.PinBlocksRequest, context: Context) -> v1.PinBlocksResponse:
        """Keeps blocks from eviction, or lets them go again."""
        self._check_model(request.selector.model)
        with self._operation():
            return v1.PinBlocksResponse(blocks_changed=await self._blocks.pin(request))

    async def DeleteBlocks(self, request: v1.DeleteBlocksRequest, context: Context) -> v1.DeleteBlocksResponse:
        """Removes blocks from every tier and every worker."""
        self._check_model(request.selector.model)
        with self._operation():
            return await self._blocks.delete(request)


def _traceparent(context: Context) -> str:
    """As the caller sent it; empty when it sent none."""
    return str(dict(context.invocation_metadata() or ()).get("traceparent", ""))


def _note(span: Span, event: v1.GenerateResponse) -> None:
    match event.WhichOneof("event"):
        case "started":
            span.event("admitted")
        case "completed":
            done = event.completed
            span.set(
                decode_worker=done.routing.decode_worker_id,
                prompt_tokens=done.usage.prompt_tokens,
                cached_tokens=done.usage.cached_tokens,
                completion_tokens=done.usage.completion_tokens,
                shipped_bytes=done.usage.shipped_bytes,
                ttft_ms=done.timings.ttft_ms,
            )
