"""Statuses and google.rpc details as exceptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

import drystone
from tests.client.canned_gateway import failure

if TYPE_CHECKING:
    from tests.client.canned_gateway import CannedGateway

S = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (S.INVALID_ARGUMENT, "PROMPT_TOO_LONG", drystone.InvalidRequestError),
        (S.NOT_FOUND, "UNKNOWN_BLOCK_KEY", drystone.NotFoundError),
        (S.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE_FOR_POOL", drystone.OverloadedError),
        (S.UNAVAILABLE, "NO_DECODE_WORKER", drystone.UnavailableError),
        (S.FAILED_PRECONDITION, "MODEL_CHANGED", drystone.IncompatibleError),
        (S.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", drystone.DeadlineExceededError),
        (S.CANCELLED, "CANCELLED", drystone.CancelledError),
        (S.UNIMPLEMENTED, "NOT_SUPPORTED", drystone.NotSupportedError),
        (S.INTERNAL, "INTERNAL", drystone.InternalError),
    ],
)
def test_each_status_has_its_class(
    gateway: CannedGateway, code: grpc.StatusCode, reason: str, expected: type[drystone.DrystoneError]
) -> None:
    gateway.failure = failure(code, reason, message="words")
    with drystone.Client(gateway.address) as client, pytest.raises(drystone.DrystoneError) as caught:
        client.generate("Why?", documents=["text"], request_id="mine")
    assert type(caught.value) is expected
    assert caught.value.reason == reason
    assert caught.value.message == "words"
    assert caught.value.request_id == "mine"
    assert caught.value.retry_after is None


def test_details_of_an_invalid_request(gateway: CannedGateway) -> None:
    gateway.failure = failure(
        S.INVALID_ARGUMENT,
        "DOCUMENT_TOO_LARGE",
        field="rag.documents[3].text",
        metadata={"limit": "100", "value": "150", "request_id": "theirs"},
    )
    with drystone.Client(gateway.address) as client, pytest.raises(drystone.InvalidRequestError) as caught:
        client.generate("Why?", documents=["text"])
    error = caught.value
    assert (error.field, error.limit, error.value) == ("rag.documents[3].text", "100", "150")
    assert error.request_id == "theirs"
    assert "DOCUMENT_TOO_LARGE" in repr(error)


def test_an_error_after_text_carries_the_servers_request_id(gateway: CannedGateway) -> None:
    gateway.failure = failure(S.UNAVAILABLE, "WORKER_LOST")
    gateway.fail_after_first = True
    with drystone.Client(gateway.address) as client, client.stream("Why?", documents=["text"]) as stream:
        assert isinstance(next(stream), drystone.Started)
        assert isinstance(next(stream), drystone.TextDelta)
        with pytest.raises(drystone.UnavailableError) as caught:
            next(stream)
        assert list(stream) == []
    assert caught.value.request_id == "made-by-server"


def test_a_lost_connection_is_told_from_no_server(gateway: CannedGateway) -> None:
    gateway.failure = failure(S.UNAVAILABLE, "SOMETHING", domain="elsewhere")
    gateway.fail_after_first = True
    with drystone.Client(gateway.address) as client, pytest.raises(drystone.ConnectError) as caught:
        client.generate("Why?", documents=["text"])
    assert caught.value.reason == "CONNECTION_LOST"
    assert caught.value.message == f"the gateway at {gateway.address} went away"


@pytest.mark.parametrize("code", [S.UNAVAILABLE, S.CANCELLED])
def test_a_gateway_that_stops_before_it_answers_went_away(gateway: CannedGateway, code: grpc.StatusCode) -> None:
    gateway.failure = failure(code, "", message="Cancelling all calls", domain="elsewhere")
    with drystone.Client(gateway.address) as client, pytest.raises(drystone.ConnectError) as caught:
        client.generate("Why?", documents=["text"])
    assert caught.value.reason == "CONNECTION_LOST"
    assert "Cancelling" not in caught.value.message
