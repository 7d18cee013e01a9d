"""Figures of requests with several samples."""

from __future__ import annotations

from unittest import mock

import pytest

from drystone.v1.sampling_pb2 import FinishReason, TokenLogprob
from drystone.v1.statistics_pb2 import RoutingStats
from gateway import accounting
from gateway.accounting import Account
from gateway.events import public_events
from shared.internal.v1.decode_pb2 import Ended, GenerateResponse, SampleEnded, Tokens
from shared.metrics import Metrics
from tests.support.tickets import ticket


def tokens(sample: int, *token_ids: int) -> GenerateResponse:
    logprobs = [TokenLogprob(token_id=token_id, logprob=-0.5) for token_id in token_ids]
    return GenerateResponse(tokens=Tokens(sample_index=sample, token_ids=token_ids, text="x", logprobs=logprobs))


def ended(sample: int, count: int) -> GenerateResponse:
    reason = FinishReason.FINISH_REASON_STOP
    return GenerateResponse(
        sample_ended=SampleEnded(sample_index=sample, completion_tokens=count, finish_reason=reason)
    )


def test_samples_are_counted_together_and_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, metrics, fetcher = ticket(arrived=100.0, planned=100.5), mock.Mock(spec=Metrics), mock.Mock(retries=0)
    account = Account(planned, RoutingStats(), metrics)
    clock = mock.Mock()
    monkeypatch.setattr(accounting, "time", clock)
    said = []
    for at, response in [
        (101.0, tokens(1, 5)),  # the first of any
        (103.0, tokens(0, 6)),  # its sample's first: neither
        (104.0, tokens(1, 7, 8)),
        (104.5, tokens(1)),  # text that was held back
        (105.0, ended(1, 3)),
        (109.0, tokens(0, 9)),
        (110.0, ended(0, 2)),
    ]:
        clock.monotonic.return_value = at
        said += public_events(response, planned, account, fetcher)
    assert [call.args for call in metrics.observe.call_args_list] == [
        ("time_to_first_token_seconds", 1.0),
        ("inter_token_latency_seconds", 3.0),
        ("inter_token_latency_seconds", 6.0),
    ]
    account.ended = Ended()
    completed = account.completed(fetcher)
    assert completed.usage.completion_tokens == 5
    assert completed.timings.ttft_ms == 1000.0
    assert [event.WhichOneof("event") for event in said] == ["delta"] * 4 + ["sample_finished", "delta"] + [
        "sample_finished"
    ]
    assert [event.delta.sample_index for event in said if event.HasField("delta")] == [1, 0, 1, 1, 0]
    assert [entry.token_id for entry in said[2].delta.logprobs] == [7, 8]
    finished = [event.sample_finished for event in said if event.HasField("sample_finished")]
    assert [(each.sample_index, each.completion_tokens) for each in finished] == [(1, 3), (0, 2)]
