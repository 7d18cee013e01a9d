"""What callers give as protobuf requests, and what is refused before it is sent."""

from __future__ import annotations

from typing import Any

import pytest

from drystone import Block, Document, InvalidRequestError, Message, Template, Truncation
from drystone._requests import generate_request
from drystone.v1 import prompt_pb2, sampling_pb2


def test_absent_options_stay_absent() -> None:
    request = generate_request("Why?", {"documents": ["text"], "temperature": None})
    assert not request.rag.HasField("instructions")
    assert not request.sampling.HasField("temperature")
    assert request.attention == prompt_pb2.ATTENTION_UNSPECIFIED
    assert not request.HasField("truncation")
    assert not request.HasField("n")


def test_every_option_is_carried() -> None:
    request = generate_request(
        None,
        {
            "blocks": ["one", Block(b"\xff"), Block(key="a" * 64)],
            "attention": "full",
            "truncation": Truncation("left", 100),
            "template": Template("tulu", {"tools": ["a"]}, enable_thinking=False),
            "n": 2,
            "temperature": 0.0,
            "top_k": 5,
            "seed": 2**64 - 1,
            "logprobs": 0,
            "stop": ["a", "b"],
            "stop_token_ids": [3],
            "logit_bias": {5: -1.5},
            "model": "m",
        },
    )
    assert [block.WhichOneof("content") for block in request.blocks.blocks] == ["text", "utf8_text", "block_key"]
    assert request.attention == prompt_pb2.ATTENTION_FULL
    assert request.truncation.side == prompt_pb2.TRUNCATION_SIDE_LEFT
    assert request.truncation.max_prompt_tokens == 100
    assert request.template.name == "tulu"
    assert request.template.HasField("enable_thinking")
    assert not request.template.HasField("add_bos")
    assert request.template.chat_template_kwargs["tools"][0] == "a"
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("logprobs")
    assert request.sampling.seed == 2**64 - 1
    assert request.sampling.logit_bias[5] == -1.5


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({}, None),
        ({"json_schema": None, "choices": None}, None),
        ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": '{"type": "array"}'}, {"json_schema": '{"type": "array"}'}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choices": ["yes", "no"]}, {"choice": sampling_pb2.StructuredOutput.Choice(options=["yes", "no"])}),
        # Nothing in it is still a choice; the server says what is wrong.
        ({"choices": []}, {"choice": sampling_pb2.StructuredOutput.Choice()}),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ],
)
def test_the_shape_of_the_answer_is_carried(options: Any, constraint: Any) -> None:
    request = generate_request("Why?", {"documents": ["text"], **options})
    assert request.HasField("structured_output") == (constraint is not None)
    if constraint is not None:
        assert request.structured_output == sampling_pb2.StructuredOutput(**constraint)


def test_penalties_and_samples_are_carried() -> None:
    request = generate_request(
        "Why?",
        {
            "documents": ["text"],
            "n": 3,
            "repetition_penalty": 1.5,
            "presence_penalty": -1.0,
            "frequency_penalty": 0.0,
            "logprobs": 2,
        },
    )
    sampling = request.sampling
    assert (request.n, sampling.repetition_penalty, sampling.presence_penalty, sampling.logprobs) == (3, 1.5, -1.0, 2)
    assert sampling.HasField("frequency_penalty")


def test_messages() -> None:
    messages: list[Any] = [Message("system", "Be brief."), {"role": "user", "content": "Why?"}]
    request = generate_request(None, {"messages": messages, "documents": [Document("T", b"bytes"), Document(key="k")]})
    assert [message.role for message in request.chat.messages] == ["system", "user"]
    assert [document.WhichOneof("content") for document in request.chat.documents] == ["utf8_text", "block_key"]


@pytest.mark.parametrize(
    ("question", "options", "said"),
    [
        (None, {}, "exactly one"),
        ("Why?", {"blocks": ["a"]}, "got question, blocks"),
        (None, {"blocks": ["a"], "documents": ["b"]}, "take no documents"),
        (None, {"messages": [], "instructions": "x"}, "go with question"),
        ("Why?", {"temprature": 1.0}, "unknown options: temprature"),
        ("Why?", {"max_new_tokens": 1.5}, "max_new_tokens"),
        ("Why?", {"regex": "a", "choices": ["b"]}, "at most one of .*got regex, choices"),
        ("Why?", {"choices": "yes"}, "a sequence"),
        ("Why?", {"json_schema": {"const": {1}}}, "not JSON serializable"),
        ("Why?", {"regex": 5}, "regex: a string, not int"),
    ],
)
def test_wrong_calls_are_type_errors(question: str | None, options: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        generate_request(question, options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": -1}, "sampling.max_new_tokens"),
        ({"stop_token_ids": [-1]}, "sampling"),
        ({"attention": "sparse"}, "attention"),
        ({"attention": "unspecified"}, "attention"),
        ({"truncation": "middle"}, "truncation.side"),
        ({"truncation": Truncation("left", -1)}, "truncation.max_prompt_tokens"),
        ({"n": -1}, "n"),
        ({"json_schema": {"minimum": float("nan")}}, "structured_output"),
        ({"choices": ["\ud800"]}, "structured_output"),
        ({"template": Template(chat_template_kwargs={"a": {1}})}, "template.chat_template_kwargs"),
    ],
)
def test_what_cannot_be_carried_is_an_invalid_request(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request("Why?", {"documents": ["text"], **options})
    assert caught.value.field == field
    assert caught.value.reason in {"INVALID_SAMPLING", "INVALID_FIELD", "INVALID_STRUCTURED_OUTPUT"}


@pytest.mark.parametrize("options", [{"documents": ["\ud800"]}, {"documents": ["ok"], "instructions": "\udcff"}])
def test_lone_surrogates_are_an_invalid_request(options: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        generate_request("Why?", options)
    assert caught.value.reason == "INVALID_UTF8"


def test_text_and_key_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        Document(text="a", key="b")
    with pytest.raises(ValueError, match="not both"):
        Block("a", "b")


def test_reprs_are_short() -> None:
    assert repr(Document("Walls", "x" * 1000)) == "Document('Walls', 1000 characters)"
    assert repr(Block(key="a" * 64)) == "Block(key='aaaaaaaaaaaa…')"
