"""A real gRPC server with canned answers: Generation and Operations as a gateway would serve them."""

from __future__ import annotations

import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from drystone.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    prompt_pb2,
    sampling_pb2,
    statistics_pb2,
)
from tests.client.canned_blocks import CannedBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = ["a" * 64, "b" * 64, "c" * 64]
MESSAGE_BYTES = 64 << 20


class CannedGateway(CannedBlocks, operations_pb2_grpc.OperationsServicer):
    """Answers every prompt with the same events.

    Attributes:
        requests: Requests received.
        failure: Status to fail with, when set.
        fail_after_first: Fail only after the first delta.
        hold: Wait after the first delta until the client goes away.
        leave_out_completed: End the stream without its last event.
        arrived: Set when a Generate call has come.
        ended: Set when a Generate call has ended on the server's side, with `was_cancelled`.
    """

    def __init__(self) -> None:
        super().__init__(lambda message: failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message=message))
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.failure: status_pb2.Status | None = None
        self.fail_after_first = False
        self.hold = False
        self.leave_out_completed = False
        self.text = "Gravity "
        self.arrived = threading.Event()
        self.ended = threading.Event()
        self.was_cancelled = False
        self._server = grpc.server(
            futures.ThreadPoolExecutor(4),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
            ],
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(self, self._server)
        operations_pb2_grpc.add_OperationsServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()

    def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> Iterator[Any]:  # noqa: N802
        self.requests.append(request)
        self.arrived.set()
        gone = threading.Event()
        completed = False

        def on_end() -> None:
            self.was_cancelled = not completed
            gone.set()
            self.ended.set()

        context.add_callback(on_end)
        if self.failure is not None and not self.fail_after_first:
            context.abort_with_status(rpc_status.to_status(self.failure))
        yield started(request)
        yield delta(self.text, [11, 12])
        if self.failure is not None:
            context.abort_with_status(rpc_status.to_status(self.failure))
        if self.hold:
            gone.wait(20)
            return
        yield generation_pb2.GenerateResponse()
        yield delta("holds it.", [13])
        yield generation_pb2.GenerateResponse(
            sample_finished=generation_pb2.SampleFinished(
                finish_reason=sampling_pb2.FINISH_REASON_STOP, matched_stop_token_id=2, completion_tokens=3
            )
        )
        completed = True
        if not self.leave_out_completed:
            yield completed_event()

    def GetModel(self, request: generation_pb2.GetModelRequest, context: Any) -> Any:  # noqa: N802
        if request.model not in ("", "tiny"):
            context.abort_with_status(rpc_status.to_status(failure(grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")))
        return generation_pb2.GetModelResponse(model="tiny", dtype="float32", context_tokens=2048, aliases=["t"])

    def GetStatus(self, request: operations_pb2.GetStatusRequest, context: Any) -> Any:  # noqa: N802
        del request, context
        gateway = operations_pb2.ProcessStatus(
            worker_id="gateway",
            role=operations_pb2.PROCESS_ROLE_GATEWAY,
            state=operations_pb2.PROCESS_STATE_READY,
            address=self.address,
            values=[operations_pb2.StatusValue(name="num_requests_running", value=2)],
        )
        decode = operations_pb2.ProcessStatus(
            worker_id="decode-0",
            role=operations_pb2.PROCESS_ROLE_DECODE,
            state=99,  # type: ignore[arg-type] # a state that only newer servers know
            address="127.0.0.1:1",
            model="[bold]tiny",
            values=[operations_pb2.StatusValue(name="pool_used_bytes", value=3 << 20)],
            pairs=[canned_pair()],
        )
        return operations_pb2.GetStatusResponse(processes=[gateway, decode])


def canned_pair() -> operations_pb2.PairStatus:
    return operations_pb2.PairStatus(
        peer="[bold]prefill-0",
        direction=operations_pb2.PAIR_DIRECTION_RECEIVE,
        transport="zmq-tcp",
        curve=True,
        state=operations_pb2.PAIR_STATE_OPEN,
        bytes_total=5 << 20,
        chunks_total=5,
        refused_total=2,
        outstanding_bytes=1 << 20,
        credit_free_bytes=15 << 20,
        fallbacks_total=1,
        last_error="CHECKSUM: checksum does not match",
        age_seconds=7.5,
    )


def failure(
    code: grpc.StatusCode,
    reason: str,
    *,
    message: str = "no",
    field: str = "",
    metadata: dict[str, str] | None = None,
    retry_ms: int = 0,
    domain: str = "drystone",
) -> status_pb2.Status:
    """A status with google.rpc details, as the server makes them."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})]
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(retry_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        holder = any_pb2.Any()
        holder.Pack(detail)
        packed.append(holder)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def started(request: generation_pb2.GenerateRequest) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        started=generation_pb2.Started(
            request_id=request.request_id or "made-by-server",
            model="tiny",
            model_fingerprint="f" * 64,
            seed=request.sampling.seed or 7,
            prompt_tokens=60,
            attention=prompt_pb2.ATTENTION_BLOCK,
            blocks=_blocks(),
        )
    )


def delta(text: str, token_ids: list[int]) -> generation_pb2.GenerateResponse:
    logprobs = [
        sampling_pb2.TokenLogprob(
            token_id=token_id, logprob=-0.5, token=b"\xe2", top=[sampling_pb2.TopLogprob(token_id=1, logprob=-0.1)]
        )
        for token_id in token_ids
    ]
    return generation_pb2.GenerateResponse(
        delta=generation_pb2.Delta(text=text, token_ids=token_ids, logprobs=logprobs)
    )


def completed_event() -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        completed=generation_pb2.Completed(
            usage=statistics_pb2.Usage(
                prompt_tokens=60, completion_tokens=3, cached_tokens=20, encoded_tokens=30, shipped_bytes=1536
            ),
            timings=statistics_pb2.Timings(ttft_ms=120.0, total_ms=320.0),
            blocks=_blocks(),
            routing=statistics_pb2.RoutingStats(decode_worker_id="decode-0", fetch_retries=1),
        )
    )


def _blocks() -> list[statistics_pb2.BlockStats]:
    return [
        statistics_pb2.BlockStats(
            block_key=KEYS[0],
            role=statistics_pb2.BLOCK_ROLE_PREAMBLE,
            tokens=20,
            source=statistics_pb2.BLOCK_SOURCE_RESIDENT,
        ),
        statistics_pb2.BlockStats(
            block_key=KEYS[1],
            role=statistics_pb2.BLOCK_ROLE_PASSAGE,
            tokens=30,
            source=statistics_pb2.BLOCK_SOURCE_PREFILL_RAM,
            document_index=0,
            offset=20,
            shipped_bytes=1536,
        ),
        statistics_pb2.BlockStats(block_key=KEYS[2], role=statistics_pb2.BLOCK_ROLE_QUESTION, tokens=10, offset=50),
    ]
