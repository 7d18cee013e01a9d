"""What the engine says to gateways, made from a request's state."""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.fetch import FetchTable
from decode_worker.request import Fetch, Request
from decode_worker.sample import Sample
from drystone.v1.sampling_pb2 import FinishReason, TokenLogprob
from drystone.v1.statistics_pb2 import BlockSource
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import KvEndpoint
from shared.internal.v1.decode_pb2 import (
    Admitted,
    Arrival,
    Ended,
    Failed,
    GenerateResponse,
    Missing,
    MissingBlock,
    SampleEnded,
    Tokens,
)


def admitted(request: Request, fetches: FetchTable) -> GenerateResponse:
    """Everything the request needs is reserved."""
    driven = {fetch.key for fetch in request.fetches if fetch.waiters[0] is request}
    message = Admitted(
        worker=fetches.identity,
        resident=[pin.block.key for pin in request.pins],
        awaited=[fetch.key for fetch in request.fetches if fetch.key not in driven],
        queue_ms=max(0.0, request.admitted - request.arrived) * 1e3,
        tail_tokens_reused=request.tail_tokens_reused,
    )
    return GenerateResponse(call_id=request.call_id, admitted=message)


def missing(request: Request, fetches: Sequence[Fetch], table: FetchTable, endpoint: KvEndpoint) -> GenerateResponse:
    """The request's gateway shall have these shipped."""
    blocks = [MissingBlock(key=fetch.key, reservation=table.reservation(fetch)) for fetch in fetches]
    return GenerateResponse(call_id=request.call_id, missing=Missing(blocks=blocks, endpoint=endpoint))


def tokens(
    request: Request, sample: Sample, token_ids: Sequence[int], text: str, logprob: TokenLogprob | None = None
) -> GenerateResponse:
    """New tokens and the text that is now certain."""
    message = Tokens(
        sample_index=sample.index, token_ids=token_ids, text=text, logprobs=[] if logprob is None else [logprob]
    )
    return GenerateResponse(call_id=request.call_id, tokens=message)


def sample_ended(
    request: Request, sample: Sample, reason: FinishReason.ValueType, stop_token: int | None
) -> GenerateResponse:
    """A sample has ended."""
    message = SampleEnded(
        sample_index=sample.index,
        finish_reason=reason,
        matched_stop=sample.text.matched_stop,
        matched_stop_token_id=stop_token,
        completion_tokens=len(sample.generated),
    )
    return GenerateResponse(call_id=request.call_id, sample_ended=message)


def ended(request: Request) -> GenerateResponse:
    """The call has ended well. A block that the prompt repeats is counted at its first place alone."""
    seen: set[bytes] = set()
    arrivals = []
    for block in request.blocks:
        arrival = Arrival(key=block.key)
        if block.key in request.arrivals:
            arrival.CopyFrom(request.arrivals[block.key])
        if block.key in seen:
            arrival.source = BlockSource.BLOCK_SOURCE_RESIDENT
            arrival.shipped_bytes, arrival.fetch_ms, arrival.encode_ms = 0, 0.0, 0.0
        seen.add(block.key)
        arrivals.append(arrival)
    message = Ended(
        arrivals=arrivals,
        fetch_ms=(request.fetched - request.admitted) * 1e3,
        first_step_ms=max(0.0, request.first_token - request.fetched) * 1e3,
        steps=request.steps,
        tail_keys=request.tail_keys,
    )
    return GenerateResponse(call_id=request.call_id, ended=message)


def failed(request: Request, error: DrystoneError) -> GenerateResponse:
    """The call has failed."""
    return failed_call(request.call_id, error)


def failed_call(call_id: int, error: DrystoneError) -> GenerateResponse:
    """A call has failed, perhaps before there was a request."""
    message = Failed(
        reason=error.reason,
        message=error.message,
        grpc_status=error.status.value[0],
        retry_after_ms=error.retry_after_ms or 0,
        metadata=error.metadata,
    )
    return GenerateResponse(call_id=call_id, failed=message)
