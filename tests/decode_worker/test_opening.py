"""What a gateway says is checked before memory is touched: wrong keys, strange tokens, unknown wishes."""

from __future__ import annotations

from typing import Any

import pytest

from decode_worker.opening import Opener
from decode_worker.settings import DecodeSettings
from drystone.v1.sampling_pb2 import Resume, SamplingParams, StructuredOutput
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef
from shared.internal.v1.decode_pb2 import Open
from tests.support.tiny_models import tiny_tokenizer

SAMPLING = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "seed": 1}


@pytest.fixture
def opener(model: ServedModel) -> Opener:
    return Opener(model, tiny_tokenizer().backend_tokenizer, incarnation=11, default_timeout_seconds=5.0)


def message(model: ServedModel, **changes: Any) -> Open:
    ids = [5, 6, 7]
    values: dict[str, Any] = {
        "request_id": "r",
        "blocks": [BlockRef(key=model.key_space().key(ids), token_ids=ids, store=True)],
        "question_token_ids": [8, 9],
        "sampling": SamplingParams(**SAMPLING),  # type: ignore[arg-type]
        "n": 1,
        "model_fingerprint": model.fingerprint,
        **changes,
    }
    return Open(**values)


def refused(opener: Opener, opened: Open) -> DrystoneError:
    with pytest.raises(DrystoneError) as caught:
        opener.open(1, opened, lambda _: None)
    return caught.value


def test_a_right_message_becomes_a_request(opener: Opener, model: ServedModel) -> None:
    request = opener.open(1, message(model, expected_incarnation=11), lambda _: None)
    assert (request.prompt_tokens, request.question_start) == (5, 3)
    salted = message(
        model, tenant_salt=b"a", blocks=[BlockRef(key=model.key_space(b"a").key([5, 6]), token_ids=[5, 6])]
    )
    assert opener.open(2, salted, lambda _: None).question_start == 2


def test_a_key_that_is_not_of_its_tokens_is_refused(opener: Opener, model: ServedModel) -> None:
    right = model.key_space().key([5, 6, 7])
    for key, ids in ((right, [5, 6, 8]), (right[:31], [5, 6, 7]), (b"", [5]), (right + b"x", [5, 6, 7])):
        error = refused(opener, message(model, blocks=[BlockRef(key=key, token_ids=ids)]))
        assert error.reason is Reason.INTERNAL
        assert "not of the tokens" in error.message
    assert "not of the tokens" in refused(opener, message(model, tenant_salt=b"other")).message


def test_tokens_without_embeddings_are_refused(opener: Opener, model: ServedModel) -> None:
    far = model.vocabulary_size
    blocks = [BlockRef(key=model.key_space().key([far]), token_ids=[far])]
    for changes in ({"question_token_ids": [far]}, {"blocks": blocks}):
        assert refused(opener, message(model, **changes)).reason is Reason.INCOMPATIBLE_WORKERS
    assert "without tokens" in refused(opener, message(model, question_token_ids=[])).message


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("n", {"n": 4}),
        ("structured_output", {"structured_output": StructuredOutput(regex="a+")}),
        ("resume", {"resume": Resume()}),
        ("keep_tail", {"keep_tail": True}),
        ("reuse_tail", {"reuse_tail": True}),
        ("repetition_penalty", {"sampling": SamplingParams(**SAMPLING, repetition_penalty=1.5)}),  # type: ignore[arg-type]
        ("logit_bias", {"sampling": SamplingParams(**SAMPLING, logit_bias={1: 2.0})}),  # type: ignore[arg-type]
        ("logprobs", {"sampling": SamplingParams(**SAMPLING, logprobs=1)}),  # type: ignore[arg-type]
    ],
)
def test_what_it_cannot_do_it_refuses(opener: Opener, model: ServedModel, name: str, changes: dict[str, Any]) -> None:
    error = refused(opener, message(model, **changes))
    assert error.reason is Reason.NOT_SUPPORTED
    assert name in error.message


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
