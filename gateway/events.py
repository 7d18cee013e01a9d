"""What a decode worker says, in the words of the public API."""

from __future__ import annotations

from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import Attention
from gateway.accounting import Account, planned_blocks
from gateway.fetcher import Fetcher
from gateway.ticket import Ticket
from shared.errors import DrystoneError, Reason
from shared.internal.v1.decode_pb2 import Failed, GenerateResponse, SampleEnded, Tokens


def public_events(
    response: GenerateResponse, ticket: Ticket, account: Account, fetcher: Fetcher
) -> list[v1.GenerateResponse]:
    """Events for the client, none or one; accounts what passes by and hands missing blocks to the fetcher.

    Raises:
        DrystoneError: The call has failed.
    """
    kind = response.WhichOneof("message")
    if kind == "admitted":
        account.admitted = response.admitted
        return [v1.GenerateResponse(started=_started(ticket))]
    if kind == "missing":
        fetcher.drive(response.missing)
    elif kind == "tokens":
        fetcher.all_arrived()
        if response.tokens.token_ids:
            account.token_sent(response.tokens.sample_index)
        return [v1.GenerateResponse(delta=_delta(response.tokens))]
    elif kind == "sample_ended":
        fetcher.all_arrived()
        account.sample_finished(response.sample_ended)
        return [v1.GenerateResponse(sample_finished=_finished(response.sample_ended))]
    elif kind == "ended":
        account.ended = response.ended
    elif kind == "failed":
        raise _failure(response.failed, fetcher)
    return []


def _started(ticket: Ticket) -> v1.Started:
    return v1.Started(
        request_id=ticket.request_id,
        model=ticket.model,
        model_fingerprint=ticket.compatibility.model_fingerprint.hex(),
        seed=ticket.sampling.seed,
        prompt_tokens=ticket.plan.prompt_tokens,
        truncated_tokens=ticket.plan.truncated_tokens,
        dropped_documents=ticket.plan.dropped_documents,
        blocks=planned_blocks(ticket),
        attention=Attention.ValueType(ticket.plan.attention),
    )


def _delta(tokens: Tokens) -> v1.Delta:
    return v1.Delta(
        sample_index=tokens.sample_index, text=tokens.text, token_ids=tokens.token_ids, logprobs=tokens.logprobs
    )


def _finished(ended: SampleEnded) -> v1.SampleFinished:
    finished = v1.SampleFinished(
        sample_index=ended.sample_index,
        finish_reason=ended.finish_reason,
        matched_stop=ended.matched_stop,
        completion_tokens=ended.completion_tokens,
    )
    if ended.HasField("matched_stop_token_id"):
        finished.matched_stop_token_id = ended.matched_stop_token_id
    return finished


def _failure(failed: Failed, fetcher: Fetcher) -> DrystoneError:
    if failed.reason == Reason.BLOCK_UNAVAILABLE and fetcher.overload is not None:
        return fetcher.overload  # the worker only knows that the block was given up, not why
    known = failed.reason in Reason.__members__
    return DrystoneError(
        Reason(failed.reason) if known else Reason.INTERNAL,
        failed.message,
        metadata=dict(failed.metadata),
        retry_after_ms=failed.retry_after_ms or None,
    )
