"""One request on its way: opened on a decode worker, its blocks fetched, its tokens relayed (design §5)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

import grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.statistics_pb2 import BlockSource, RoutingCandidate, RoutingStats, RoutingTerm
from gateway.accounting import Account
from gateway.cluster import Cluster
from gateway.events import public_events
from gateway.fetcher import CALL_ID, Fetcher, FetchPolicy
from gateway.routing import decode_choice
from gateway.ticket import Ticket
from gateway.worker import Worker
from shared.errors import DrystoneError, Reason, deadline_exceeded
from shared.internal.v1.decode_pb2 import GenerateRequest, GenerateResponse, Open
from shared.kv.tails import SEGMENT_TOKENS, chain, root_key
from shared.metrics import Metrics
from shared.rpc.errors import from_rpc_error
from shared.tracing import NO_TRACING, Tracing

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[GenerateRequest, GenerateResponse]

# The worker ends a request at its deadline with a reason; the gateway's own wait is only a backstop.
_BACKSTOP_SECONDS = 2.0


async def relay(
    ticket: Ticket, cluster: Cluster, policy: FetchPolicy, metrics: Metrics, tracing: Tracing = NO_TRACING
) -> AsyncGenerator[v1.GenerateResponse]:
    """Runs a planned request and yields its events, Started once it is admitted.

    Leaving it cancels everything under way.
    """
    worker, routing = _choose(ticket, cluster)
    account = Account(ticket, routing, metrics)
    outbox: asyncio.Queue[GenerateRequest] = asyncio.Queue()
    outbox.put_nowait(GenerateRequest(call_id=CALL_ID, open=_open(ticket, worker)))
    fetcher = Fetcher(cluster, ticket, outbox.put_nowait, policy, tracing)
    worker.load += 1
    # No deadline on the call itself: the worker's own answer says what it was waiting for.
    call = worker.decode().Generate(_drain(outbox))
    try:
        while (response := await _next(call, ticket.deadline + _BACKSTOP_SECONDS)) is not None:
            for event in public_events(response, ticket, account, fetcher):
                yield event
            if response.WhichOneof("message") == "ended":
                arrived = {bytes(a.key) for a in response.ended.arrivals if a.source}
                arrived |= fetcher.records.keys()
                held = [ref for ref in ticket.refs if ref.store and bytes(ref.key) in arrived]
                worker.remember([(bytes(ref.key), len(ref.token_ids)) for ref in held])
                worker.remember_tails(response.ended.tail_keys)
                unknown = BlockSource.BLOCK_SOURCE_UNSPECIFIED
                await fetcher.settle(bytes(a.key) for a in response.ended.arrivals if a.source == unknown)
                yield v1.GenerateResponse(completed=account.completed(fetcher))
                return
        raise DrystoneError(Reason.WORKER_LOST, f"decode worker {worker.worker_id} ended the stream early")
    except TimeoutError as error:
        raise deadline_exceeded(f"decode worker {worker.worker_id} did not answer") from error
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, Reason.WORKER_LOST) from error
    finally:
        worker.load -= 1
        call.cancel()
        await fetcher.close()


async def _next(call: Call, end: float) -> GenerateResponse | None:
    """The call's next message, None when it has ended; raises TimeoutError at `end` (`time.monotonic()`).

    Each read is timed by itself: a timeout around a `yield` would strike in the code of whoever reads.
    """
    async with asyncio.timeout(end - time.monotonic()):
        message = await call.read()
    return message if isinstance(message, GenerateResponse) else None


def _choose(ticket: Ticket, cluster: Cluster) -> tuple[Worker, RoutingStats]:
    ready = cluster.decode_workers
    workers = {worker.worker_id: worker for worker in ready if worker.serves(ticket.compatibility)}
    if not workers:
        why = "no decode worker serves the model that this prompt was planned for any more; ask again"
        said = why if ready else "no decode worker is ready"
        raise DrystoneError(Reason.NO_DECODE_WORKER, said, retry_after_ms=1000)
    loads = {name: worker.load for name, worker in workers.items()}
    resident = {name: _known_tokens(worker, ticket) for name, worker in workers.items()}
    chosen = decode_choice(loads, resident, ticket.plan.prompt_tokens)
    candidates = [
        RoutingCandidate(
            worker_id=name,
            chosen=name == chosen,
            terms=[
                RoutingTerm(name="requests_running", cost_ms=loads[name]),
                RoutingTerm(name="tokens_not_known_resident", cost_ms=ticket.plan.prompt_tokens - resident[name]),
            ],
        )
        for name in workers
    ]
    return workers[chosen], RoutingStats(decode_worker_id=chosen, candidates=candidates)


def _known_tokens(worker: Worker, ticket: Ticket) -> int:
    """Prompt tokens that a worker is known to hold: blocks, and the beginning of the question in sealed tails."""
    blocks = sum(worker.resident.get(bytes(ref.key), 0) for ref in ticket.refs)
    if not worker.tails:
        return blocks
    root = root_key(ticket.keys.tenant_salt, (ref.key for ref in ticket.refs))
    known = itertools.takewhile(worker.tails.__contains__, chain(root, ticket.plan.question_ids))
    return blocks + SEGMENT_TOKENS * sum(1 for _ in known)


def _open(ticket: Ticket, worker: Worker) -> Open:
    request = ticket.request
    return Open(
        request_id=ticket.request_id,
        traceparent=ticket.traceparent,
        expected_incarnation=worker.info.worker.incarnation if worker.info is not None else 0,
        time_left_ms=max(1, int((ticket.deadline - time.monotonic()) * 1e3)),
        blocks=ticket.refs,
        question_token_ids=ticket.plan.question_ids,
        sampling=ticket.sampling,
        n=request.n or 1,
        structured_output=request.structured_output if request.HasField("structured_output") else None,
        resume=request.resume if request.HasField("resume") else None,
        priority=request.priority,
        # Tails are found by the blocks before them, whose keys the tenant's salt is part of.
        tail_salt=ticket.keys.tenant_salt,
        keep_tail=request.keep_tail,
        reuse_tail=True,
        model_fingerprint=ticket.keys.model_fingerprint,
        tenant_salt=ticket.keys.tenant_salt,
        tenant=ticket.tenant,
    )


async def _drain(outbox: asyncio.Queue[GenerateRequest]) -> AsyncIterator[GenerateRequest]:
    while True:
        yield await outbox.get()
