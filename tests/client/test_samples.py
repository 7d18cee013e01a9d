"""Several samples of one request, put together from deltas that come in any order."""

from __future__ import annotations

from drystone._base import Progress
from drystone.v1 import generation_pb2, sampling_pb2
from tests.client.canned_gateway import completed_event, started

Event = generation_pb2.GenerateResponse


def delta(index: int, text: str, *token_ids: int) -> Event:
    logprobs = [sampling_pb2.TokenLogprob(token_id=token_id, logprob=-0.25, token=b"t") for token_id in token_ids]
    return Event(delta=generation_pb2.Delta(sample_index=index, text=text, token_ids=token_ids, logprobs=logprobs))


def finished(index: int, reason: sampling_pb2.FinishReason.ValueType, **more: str) -> Event:
    return Event(sample_finished=generation_pb2.SampleFinished(sample_index=index, finish_reason=reason, **more))


def test_an_answer_holds_every_sample_and_is_the_first() -> None:
    progress = Progress("host:1", "")
    for event in (
        started(generation_pb2.GenerateRequest()),
        delta(2, "C", 30),
        delta(0, "A", 10),
        delta(1, "B", 20, 21),
        finished(2, sampling_pb2.FINISH_REASON_LENGTH),
        delta(0, "a", 11),
        finished(1, sampling_pb2.FINISH_REASON_STOP, matched_stop="#"),
        finished(0, sampling_pb2.FINISH_REASON_STOP),
        completed_event(),
    ):
        progress.take(event)
    answer = progress.answer()
    assert [sample.index for sample in answer.samples] == [0, 1, 2]
    assert [sample.text for sample in answer.samples] == ["Aa", "B", "C"]
    assert [sample.token_ids for sample in answer.samples] == [(10, 11), (20, 21), (30,)]
    assert [sample.finish_reason for sample in answer.samples] == ["stop", "stop", "length"]
    assert [len(sample.logprobs) for sample in answer.samples] == [2, 2, 1]
    assert answer.samples[1].matched_stop == "#"
    assert (answer.text, answer.token_ids, answer.logprobs) == ("Aa", (10, 11), answer.samples[0].logprobs)
