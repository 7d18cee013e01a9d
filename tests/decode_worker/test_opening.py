"""What a gateway says is checked before memory is touched: wrong keys, strange tokens, unknown wishes."""

from __future__ import annotations

from typing import Any

import pytest

from decode_worker.opening import Opener
from decode_worker.sampling import Sampler
from decode_worker.settings import DecodeSettings
from drystone.v1.sampling_pb2 import FinishReason, Resume, ResumeSample, SamplingParams, StructuredOutput
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef
from shared.internal.v1.decode_pb2 import Open
from tests.support.tiny_models import tiny_tokenizer

SAMPLING = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "seed": 1}


@pytest.fixture
def opener(model: ServedModel) -> Opener:
    tokenizer = tiny_tokenizer().backend_tokenizer
    sampler = Sampler(tokenizer, model.vocabulary_size)
    return Opener(model, tokenizer, sampler, incarnation=11, default_timeout_seconds=5.0, max_samples=8)


def message(model: ServedModel, **changes: Any) -> Open:
    ids = [5, 6, 7]
    values: dict[str, Any] = {
        "request_id": "r",
        "blocks": [BlockRef(key=model.key_space().key(ids), token_ids=ids, store=True)],
        "question_token_ids": [8, 9],
        "sampling": SamplingParams(**SAMPLING),  # type: ignore[arg-type] # of the right kind, or wrong on purpose
        "n": 1,
        "model_fingerprint": model.fingerprint,
        **changes,
    }
    return Open(**values)


def refused(opener: Opener, opened: Open) -> DrystoneError:
    with pytest.raises(DrystoneError) as caught:
        opener.open(1, opened, lambda _: None, opener.grammar(opened))
    return caught.value


def test_a_right_message_becomes_a_request(opener: Opener, model: ServedModel) -> None:
    request = opener.open(1, message(model, expected_incarnation=11), lambda _: None)
    assert (request.prompt_tokens, request.question_start) == (5, 3)
    salted = message(
        model,
        tenant_salt=b"a",
        tail_salt=b"a",
        blocks=[BlockRef(key=model.key_space(b"a").key([5, 6]), token_ids=[5, 6])],
    )
    assert opener.open(2, salted, lambda _: None).question_start == 2


def test_a_key_that_is_not_of_its_tokens_is_refused(opener: Opener, model: ServedModel) -> None:
    right = model.key_space().key([5, 6, 7])
    for key, ids in ((right, [5, 6, 8]), (right[:31], [5, 6, 7]), (b"", [5]), (right + b"x", [5, 6, 7])):
        error = refused(opener, message(model, blocks=[BlockRef(key=key, token_ids=ids)]))
        assert error.reason is Reason.INTERNAL
        assert "not of the tokens" in error.message
    salted = message(model, tenant_salt=b"other", tail_salt=b"other")
    assert "not of the tokens" in refused(opener, salted).message


def test_tokens_without_embeddings_are_refused(opener: Opener, model: ServedModel) -> None:
    far = model.vocabulary_size
    blocks = [BlockRef(key=model.key_space().key([far]), token_ids=[far])]
    for changes in ({"question_token_ids": [far]}, {"blocks": blocks}):
        assert refused(opener, message(model, **changes)).reason is Reason.INCOMPATIBLE_WORKERS
    assert "without tokens" in refused(opener, message(model, question_token_ids=[])).message


def test_every_sample_has_a_state_of_its_own(opener: Opener, model: ServedModel) -> None:
    request = opener.open(1, message(model, n=3), lambda _: None)
    assert [sample.index for sample in request.samples] == [0, 1, 2]
    request.samples[0].state.accept(7)
    assert [sample.generated for sample in request.samples] == [[7], [], []]


def resume(model: ServedModel, *samples: ResumeSample) -> Resume:
    return Resume(samples=samples, model_fingerprint=model.fingerprint.hex())


def test_an_interrupted_answer_is_taken_up_where_its_text_was(opener: Opener, model: ServedModel) -> None:
    whole = opener.open(1, message(model, resume=resume(model, ResumeSample(token_ids=[40, 41]))), lambda _: None)
    [sample] = whole.samples
    assert (sample.generated, sample.resumed, sample.finished) == ([40, 41], (40, 41), False)
    assert len(sample.untold) > 1
    past = ResumeSample(token_ids=[40, 41], text_chars=1)
    partly = opener.open(1, message(model, resume=resume(model, past)), lambda _: None)
    assert partly.samples[0].untold == sample.untold[1:]


def test_what_had_ended_is_not_run_again(opener: Opener, model: ServedModel) -> None:
    ended = ResumeSample(sample_index=0, token_ids=[40], finished=True)
    full = ResumeSample(sample_index=1, token_ids=[40, 41, 42, 43])
    request = opener.open(1, message(model, n=3, resume=resume(model, ended, full)), lambda _: None)
    assert [sample.index for sample in request.live] == [2]
    assert [sample.over for sample in request.samples] == [None, FinishReason.FINISH_REASON_LENGTH, None]


@pytest.mark.parametrize(
    ("past", "said"),
    [
        (ResumeSample(sample_index=1), "resume.samples[0].sample_index"),
        (ResumeSample(token_ids=[40] * 5), "resume.samples[0].token_ids"),
        (ResumeSample(token_ids=[40], text_chars=10**6), "resume.samples[0].text_chars"),
    ],
)
def test_a_past_that_cannot_be_is_refused(opener: Opener, model: ServedModel, past: ResumeSample, said: str) -> None:
    error = refused(opener, message(model, resume=resume(model, past)))
    assert error.reason is Reason.INVALID_FIELD
    assert said in error.message


def test_a_past_of_another_model_or_after_the_end_is_refused(opener: Opener, model: ServedModel) -> None:
    other = Resume(samples=[ResumeSample(token_ids=[40])], model_fingerprint="0" * 64)
    assert refused(opener, message(model, resume=other)).reason is Reason.MODEL_CHANGED
    end = min(model.eos_token_ids)
    after = resume(model, ResumeSample(token_ids=[end, 40]))
    assert "after the answer's end" in refused(opener, message(model, resume=after)).message
    constrained = message(
        model,
        structured_output=StructuredOutput(choice=StructuredOutput.Choice(options=["yes"])),
        resume=resume(model, ResumeSample(token_ids=[40])),
    )
    error = refused(opener, constrained)
    assert error.reason is Reason.INVALID_FIELD
    assert "not an answer to this request" in error.message


def test_strangers_are_refused(opener: Opener, model: ServedModel) -> None:
    assert refused(opener, message(model, model_fingerprint=b"x" * 32)).reason is Reason.MODEL_CHANGED
    assert refused(opener, message(model, expected_incarnation=12)).reason is Reason.WORKER_LOST
    for name in ("temperature", "top_p", "min_p"):
        odd = SamplingParams(**{**SAMPLING, name: float("nan")})  # type: ignore[arg-type]
        assert refused(opener, message(model, sampling=odd)).reason is Reason.INVALID_SAMPLING


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "::", ""])  # noqa: S104 - refused, not bound
def test_kv_host_is_one_address(host: str) -> None:
    with pytest.raises(ValueError, match="not a wildcard"):
        DecodeSettings(kv_host=host)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("n", {"n": 9}),
        ("n", {"n": 2**32 - 1}),
        ("sampling.logprobs", {"sampling": SamplingParams(**SAMPLING, logprobs=2**31)}),  # type: ignore[arg-type]
    ],
)
def test_what_would_cost_memory_is_refused_first(
    opener: Opener, model: ServedModel, field: str, changes: dict[str, Any]
) -> None:
    error = refused(opener, message(model, **changes))
    assert (error.reason, error.field) == (Reason.INVALID_FIELD, field)


def test_tails_are_of_the_tenant_whose_blocks_they_follow(opener: Opener, model: ServedModel) -> None:
    assert refused(opener, message(model, tail_salt=b"other")).reason is Reason.INTERNAL


def test_text_that_an_end_told_and_that_was_held_back_before_is_not_told_twice(
    opener: Opener, model: ServedModel
) -> None:
    probe = opener.open(1, message(model, resume=resume(model, ResumeSample(token_ids=[40, 41]))), lambda _: None)
    said = probe.samples[0].untold
    stop = SamplingParams(**SAMPLING, stop=[said[-1] + "never"])  # type: ignore[arg-type]
    for told in (len(said) - 1, len(said)):
        past = ResumeSample(token_ids=[40, 41], text_chars=told)
        request = opener.open(1, message(model, sampling=stop, resume=resume(model, past)), lambda _: None)
        assert said[:told] + request.samples[0].untold + request.samples[0].text.finish() == said
    beyond = ResumeSample(token_ids=[40, 41], text_chars=len(said) + 1)
    assert "text_chars" in refused(opener, message(model, sampling=stop, resume=resume(model, beyond))).message
    ended = ResumeSample(token_ids=[40, 41], text_chars=10**6, finished=True)
    assert opener.open(1, message(model, resume=resume(model, ended)), lambda _: None).live == []
