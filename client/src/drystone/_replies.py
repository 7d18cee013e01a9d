"""Reads protobuf replies into the dataclasses that a caller gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from drystone import _events as events
from drystone import _results as results
from drystone import _status as status
from drystone.v1 import generation_pb2, operations_pb2, prompt_pb2, sampling_pb2, statistics_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

_Number = TypeVar("_Number", bound=int)


def event(response: generation_pb2.GenerateResponse) -> events.Event | None:
    """The event in one message of a stream; None for a kind that only newer clients know."""
    match response.WhichOneof("event"):
        case "started":
            return _started(response.started)
        case "delta":
            return _delta(response.delta)
        case "sample_finished":
            return _sample_finished(response.sample_finished)
        case "completed":
            return _completed(response.completed)
        case _:
            return None


def model_info(reply: generation_pb2.GetModelResponse) -> results.ModelInfo:
    """What GetModel said."""
    return results.ModelInfo(
        name=reply.model,
        fingerprint=reply.model_fingerprint,
        dtype=reply.dtype,
        context_tokens=reply.context_tokens,
        kv_bytes_per_token=reply.kv_bytes_per_token,
        template=reply.template,
        aliases=tuple(reply.aliases),
        sliding_window_layers=reply.sliding_window_layers,
    )


def processes(reply: operations_pb2.GetStatusResponse) -> tuple[status.ProcessStatus, ...]:
    """What GetStatus said: the gateway first, then every worker."""
    return tuple(
        status.ProcessStatus(
            worker_id=process.worker_id,
            role=enum_name(operations_pb2.ProcessRole, "PROCESS_ROLE_", process.role),
            state=enum_name(operations_pb2.ProcessState, "PROCESS_STATE_", process.state),
            address=process.address,
            model=process.model,
            model_fingerprint=process.model_fingerprint,
            version=process.version,
            uptime_seconds=process.uptime_seconds,
            incarnation=process.incarnation,
            values={value.name: value.value for value in process.values},
            detail=process.detail,
            pairs=tuple(map(_pair, process.pairs)),
        )
        for process in reply.processes
    )


def _pair(pair: operations_pb2.PairStatus) -> status.PairStatus:
    return status.PairStatus(
        peer=pair.peer,
        address=pair.address,
        direction=enum_name(operations_pb2.PairDirection, "PAIR_DIRECTION_", pair.direction),
        transport=pair.transport,
        curve=pair.curve,
        state=enum_name(operations_pb2.PairState, "PAIR_STATE_", pair.state),
        bytes_total=pair.bytes_total,
        chunks_total=pair.chunks_total,
        resent_total=pair.resent_total,
        refused_total=pair.refused_total,
        outstanding_bytes=pair.outstanding_bytes,
        credit_free_bytes=pair.credit_free_bytes,
        credit_wait_seconds_total=pair.credit_wait_seconds_total,
        bandwidth_bytes_per_second=pair.bandwidth_bytes_per_second,
        round_trip_seconds=pair.round_trip_seconds,
        fallbacks_total=pair.fallbacks_total,
        last_error=pair.last_error,
        age_seconds=pair.age_seconds,
    )


def _started(started: generation_pb2.Started) -> events.Started:
    return events.Started(
        request_id=started.request_id,
        model=started.model,
        model_fingerprint=started.model_fingerprint,
        seed=started.seed,
        attention=enum_name(prompt_pb2.Attention, "ATTENTION_", started.attention),
        prompt_tokens=started.prompt_tokens,
        truncated_tokens=started.truncated_tokens,
        dropped_documents=tuple(started.dropped_documents),
        blocks=_blocks(started.blocks),
    )


def _delta(delta: generation_pb2.Delta) -> events.TextDelta:
    return events.TextDelta(
        sample_index=delta.sample_index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(_logprob(entry) for entry in delta.logprobs),
    )


def _sample_finished(finished: generation_pb2.SampleFinished) -> events.SampleFinished:
    token_id = finished.matched_stop_token_id if finished.HasField("matched_stop_token_id") else None
    return events.SampleFinished(
        sample_index=finished.sample_index,
        finish_reason=results.FinishReason(
            enum_name(sampling_pb2.FinishReason, "FINISH_REASON_", finished.finish_reason)
        ),
        matched_stop=finished.matched_stop,
        matched_stop_token_id=token_id,
        completion_tokens=finished.completion_tokens,
    )


def _completed(completed: generation_pb2.Completed) -> events.Completed:
    usage, timings, routing = completed.usage, completed.timings, completed.routing
    return events.Completed(
        usage=results.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            encoded_tokens=usage.encoded_tokens,
            shipped_bytes=usage.shipped_bytes,
            blocks_reused=usage.blocks_reused,
            blocks_encoded=usage.blocks_encoded,
        ),
        timings=results.Timings(
            plan_ms=timings.plan_ms,
            queue_ms=timings.queue_ms,
            fetch_ms=timings.fetch_ms,
            first_step_ms=timings.first_step_ms,
            ttft_ms=timings.ttft_ms,
            total_ms=timings.total_ms,
        ),
        blocks=_blocks(completed.blocks),
        routing=results.Routing(
            decode_worker_id=routing.decode_worker_id,
            decode_failovers=routing.decode_failovers,
            fetch_retries=routing.fetch_retries,
        ),
    )


def _blocks(blocks: Iterable[statistics_pb2.BlockStats]) -> tuple[results.BlockStats, ...]:
    return tuple(
        results.BlockStats(
            key=block.block_key,
            role=results.BlockRole(enum_name(statistics_pb2.BlockRole, "BLOCK_ROLE_", block.role)),
            tokens=block.tokens,
            offset=block.offset,
            source=results.BlockSource(enum_name(statistics_pb2.BlockSource, "BLOCK_SOURCE_", block.source)),
            shipped_bytes=block.shipped_bytes,
            encode_ms=block.encode_ms,
            ship_ms=block.ship_ms,
            document_index=block.document_index if block.HasField("document_index") else None,
            worker_id=block.worker_id,
            failed_attempts=tuple(block.failed_attempts),
        )
        for block in blocks
    )


def _logprob(entry: sampling_pb2.TokenLogprob) -> results.TokenLogprob:
    return results.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        token=entry.token,
        top=tuple(results.TopLogprob(top.token_id, top.logprob, top.token) for top in entry.top),
    )


def enum_name(enum: _EnumTypeWrapper[_Number], prefix: str, number: _Number) -> str:
    """Our name of an enum value; a value that only a newer server knows is unspecified."""
    try:
        return enum.Name(number).removeprefix(prefix).lower()
    except ValueError:
        return "unspecified"
