"""One request on its way: opened on a decode worker, its blocks fetched, its tokens relayed (design §5)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.statistics_pb2 import RoutingCandidate, RoutingStats, RoutingTerm
from gateway.accounting import Account
from gateway.cluster import Cluster, Worker
from gateway.fetcher import Fetcher
from gateway.routing import decode_choice
from gateway.ticket import Ticket
from shared.errors import DrystoneError, Reason, deadline_exceeded
from shared.internal.v1.decode_pb2 import Failed, GenerateRequest, GenerateResponse, Open
from shared.metrics import Metrics
from shared.rpc.errors import from_rpc_error

_CALL_ID = 1
# The worker ends a request at its deadline with a reason; the gateway's own wait is only a backstop.
_BACKSTOP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """How hard a fetch is tried; see `GatewaySettings`."""

    attempts: int
    timeout_seconds: float


async def relay(
    ticket: Ticket, cluster: Cluster, policy: FetchPolicy, metrics: Metrics
) -> AsyncGenerator[v1.GenerateResponse]:
    """Runs a planned request and yields its events after Started; leaving it cancels everything under way."""
    worker, routing = _choose(ticket, cluster)
    account = Account(ticket, routing, metrics)
    outbox: asyncio.Queue[GenerateRequest | None] = asyncio.Queue()
    outbox.put_nowait(GenerateRequest(call_id=_CALL_ID, open=_open(ticket, cluster, worker)))
    fetcher = Fetcher(
        cluster,
        {bytes(ref.key): ref for ref in ticket.refs},
        outbox.put_nowait,
        request_id=ticket.request_id,
        traceparent=ticket.traceparent,
        deadline=ticket.deadline,
        attempts=policy.attempts,
        timeout_seconds=policy.timeout_seconds,
    )
    worker.load += 1
    # No deadline on the call itself: the worker's own answer says what it was waiting for.
    call = worker.decode().Generate(_drain(outbox))
    try:
        async with asyncio.timeout(ticket.deadline - time.monotonic() + _BACKSTOP_SECONDS):
            async for response in call:
                for event in _events(response, account, fetcher):
                    yield event
                if response.WhichOneof("message") == "ended":
                    worker.remember([(bytes(ref.key), len(ref.token_ids)) for ref in ticket.refs if ref.store])
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


def _choose(ticket: Ticket, cluster: Cluster) -> tuple[Worker, RoutingStats]:
    workers = {worker.worker_id: worker for worker in cluster.decode_workers}
    if not workers:
        raise DrystoneError(Reason.NO_DECODE_WORKER, "no decode worker is ready", retry_after_ms=1000)
    loads = {name: worker.load for name, worker in workers.items()}
    resident = {
        name: sum(worker.resident.get(bytes(ref.key), 0) for ref in ticket.refs) for name, worker in workers.items()
    }
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


def _open(ticket: Ticket, cluster: Cluster, worker: Worker) -> Open:
    return Open(
        request_id=ticket.request_id,
        traceparent=ticket.traceparent,
        expected_incarnation=worker.info.worker.incarnation if worker.info is not None else 0,
        time_left_ms=max(1, int((ticket.deadline - time.monotonic()) * 1e3)),
        blocks=ticket.refs,
        question_token_ids=ticket.plan.question_ids,
        sampling=ticket.sampling,
        n=1,
        priority=ticket.priority,
        model_fingerprint=cluster.info.compatibility.model_fingerprint,
    )


def _events(response: GenerateResponse, account: Account, fetcher: Fetcher) -> list[v1.GenerateResponse]:
    kind = response.WhichOneof("message")
    if kind == "admitted":
        account.admitted = response.admitted
    elif kind == "missing":
        fetcher.drive(response.missing)
    elif kind == "tokens":
        tokens = response.tokens
        if tokens.token_ids:
            account.token_sent()
        delta = v1.Delta(
            sample_index=tokens.sample_index, text=tokens.text, token_ids=tokens.token_ids, logprobs=tokens.logprobs
        )
        return [v1.GenerateResponse(delta=delta)]
    elif kind == "sample_ended":
        account.sample_ended = ended = response.sample_ended
        finished = v1.SampleFinished(
            sample_index=ended.sample_index,
            finish_reason=ended.finish_reason,
            matched_stop=ended.matched_stop,
            completion_tokens=ended.completion_tokens,
        )
        if ended.HasField("matched_stop_token_id"):
            finished.matched_stop_token_id = ended.matched_stop_token_id
        return [v1.GenerateResponse(sample_finished=finished)]
    elif kind == "ended":
        account.ended = response.ended
    elif kind == "failed":
        raise _failure(response.failed)
    return []


def _failure(failed: Failed) -> DrystoneError:
    known = failed.reason in Reason.__members__
    return DrystoneError(
        Reason(failed.reason) if known else Reason.INTERNAL,
        failed.message,
        metadata=dict(failed.metadata),
        retry_after_ms=failed.retry_after_ms or None,
    )


async def _drain(outbox: asyncio.Queue[GenerateRequest | None]) -> AsyncIterator[GenerateRequest]:
    while (message := await outbox.get()) is not None:
        yield message
