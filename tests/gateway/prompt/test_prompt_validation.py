"""One row per rule: what breaks it, and what the error names."""

import math

import pytest

from drystone.v1 import generation_pb2 as pb
from drystone.v1 import prompt_pb2, sampling_pb2
from gateway.prompt import PromptLimits, block_keys_in, filled_sampling, validate
from shared.errors import InvalidRequestError, Reason

KEY = "0123456789abcdef" * 4
LIMITS = PromptLimits(
    max_documents=3, max_blocks=3, max_messages=2, max_document_bytes=64, max_title_bytes=16, max_question_bytes=64
)
Document = prompt_pb2.Document
BlockInput = prompt_pb2.BlockInput
Message = prompt_pb2.ChatMessage


def rag(*documents: Document, question: str = "Why?", **fields: object) -> pb.GenerateRequest:
    documents = documents or (Document(text="Stone."),)
    return pb.GenerateRequest(rag=prompt_pb2.RagPrompt(documents=documents, question=question), **fields)


def blocks(*contents: BlockInput) -> pb.GenerateRequest:
    return pb.GenerateRequest(blocks=prompt_pb2.BlocksPrompt(blocks=contents))


def chat(*messages: Message, documents: tuple[Document, ...] = ()) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=prompt_pb2.ChatPrompt(messages=messages, documents=documents))


def sampled(**fields: object) -> pb.GenerateRequest:
    return rag(sampling=sampling_pb2.SamplingParams(**fields))


def resumed(
    *samples: dict[str, object], seed: int | None = 7, fingerprint: str = KEY, n: int = 1
) -> pb.GenerateRequest:
    past = [sampling_pb2.ResumeSample(**sample) for sample in samples]
    resume = sampling_pb2.Resume(samples=past, model_fingerprint=fingerprint)
    return rag(resume=resume, sampling=sampling_pb2.SamplingParams(seed=seed, max_new_tokens=2), n=n)


text, user = Document(text="Stone."), Message(role="user", content="Why?")
local, last = BlockInput(text="Stone."), BlockInput(text="Why?")

BAD_PROMPTS = [
    (pb.GenerateRequest(), Reason.EMPTY_PROMPT, "prompt"),
    (pb.GenerateRequest(rag=prompt_pb2.RagPrompt(question="Why?")), Reason.NO_DOCUMENTS, "rag.documents"),
    (rag(text, Document()), Reason.EMPTY_DOCUMENT, "rag.documents[1]"),
    (rag(text, Document(text="")), Reason.EMPTY_DOCUMENT, "rag.documents[1].text"),
    (rag(Document(title="Title", text=" \n\t")), Reason.EMPTY_DOCUMENT, "rag.documents[0].text"),
    (rag(Document(utf8_text=b"")), Reason.EMPTY_DOCUMENT, "rag.documents[0].utf8_text"),
    (rag(text, Document(text="x" * 65)), Reason.DOCUMENT_TOO_LARGE, "rag.documents[1].text"),
    (rag(Document(text="ü" * 33)), Reason.DOCUMENT_TOO_LARGE, "rag.documents[0].text"),
    (rag(Document(utf8_text=b"x" * 65)), Reason.DOCUMENT_TOO_LARGE, "rag.documents[0].utf8_text"),
    (rag(Document(title="x" * 17, text="a")), Reason.DOCUMENT_TOO_LARGE, "rag.documents[0].title"),
    (rag(text, text, text, text), Reason.TOO_MANY_DOCUMENTS, "rag.documents"),
    (rag(Document(utf8_text=b"ab\xffc")), Reason.INVALID_UTF8, "rag.documents[0].utf8_text"),
    (rag(Document(utf8_text=b"\xed\xa0\x80")), Reason.INVALID_UTF8, "rag.documents[0].utf8_text"),
    (rag(Document(block_key="abc")), Reason.INVALID_BLOCK_KEY, "rag.documents[0].block_key"),
    (rag(Document(block_key="g" * 64)), Reason.INVALID_BLOCK_KEY, "rag.documents[0].block_key"),
    (rag(Document(block_key=KEY + "\n")), Reason.INVALID_BLOCK_KEY, "rag.documents[0].block_key"),
    (rag(Document(block_key=KEY, title="Title")), Reason.INVALID_FIELD, "rag.documents[0].title"),
    (rag(text, question=""), Reason.EMPTY_PROMPT, "rag.question"),
    (rag(text, question=" \n"), Reason.EMPTY_PROMPT, "rag.question"),
    (rag(text, question="x" * 65), Reason.DOCUMENT_TOO_LARGE, "rag.question"),
    (blocks(), Reason.EMPTY_PROMPT, "blocks.blocks"),
    (blocks(local, local, local, last), Reason.TOO_MANY_DOCUMENTS, "blocks.blocks"),
    (blocks(BlockInput(), last), Reason.EMPTY_DOCUMENT, "blocks.blocks[0]"),
    (blocks(BlockInput(text=""), last), Reason.EMPTY_DOCUMENT, "blocks.blocks[0].text"),
    (blocks(BlockInput(utf8_text=b"\xc3"), last), Reason.INVALID_UTF8, "blocks.blocks[0].utf8_text"),
    (blocks(BlockInput(text="x" * 65), last), Reason.DOCUMENT_TOO_LARGE, "blocks.blocks[0].text"),
    (blocks(BlockInput(block_key="0x12"), last), Reason.INVALID_BLOCK_KEY, "blocks.blocks[0].block_key"),
    (blocks(local, BlockInput(text="")), Reason.EMPTY_PROMPT, "blocks.blocks[1].text"),
    (blocks(local, BlockInput()), Reason.EMPTY_PROMPT, "blocks.blocks[1]"),
    (blocks(local, BlockInput(block_key=KEY)), Reason.INVALID_FIELD, "blocks.blocks[1].block_key"),
    (chat(), Reason.EMPTY_PROMPT, "chat.messages"),
    (chat(user, user, user), Reason.TOO_MANY_DOCUMENTS, "chat.messages"),
    (chat(Message(content="Why?")), Reason.INVALID_FIELD, "chat.messages[0].role"),
    (chat(Message(role="r" * 65, content="Why?")), Reason.DOCUMENT_TOO_LARGE, "chat.messages[0].role"),
    (chat(user, Message(role="user", content=" ")), Reason.EMPTY_PROMPT, "chat.messages[1].content"),
    (chat(user, documents=(text, Document())), Reason.EMPTY_DOCUMENT, "chat.documents[1]"),
    (chat(user, documents=(text,) * 4), Reason.TOO_MANY_DOCUMENTS, "chat.documents"),
]

BAD_SAMPLING = [
    ({"temperature": -0.1}, "sampling.temperature"),
    ({"temperature": math.nan}, "sampling.temperature"),
    ({"temperature": math.inf}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_p": 1.01}, "sampling.top_p"),
    ({"top_p": math.nan}, "sampling.top_p"),
    ({"min_p": -0.01}, "sampling.min_p"),
    ({"min_p": 1.01}, "sampling.min_p"),
    ({"min_p": math.nan}, "sampling.min_p"),
    ({"top_k": 2**31}, "sampling.top_k"),
    ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
    ({"max_new_tokens": 4, "min_new_tokens": 5}, "sampling.min_new_tokens"),
    ({"min_new_tokens": 129}, "sampling.min_new_tokens"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ({"repetition_penalty": math.nan}, "sampling.repetition_penalty"),
    ({"repetition_penalty": math.inf}, "sampling.repetition_penalty"),
    ({"presence_penalty": math.nan}, "sampling.presence_penalty"),
    ({"frequency_penalty": -math.inf}, "sampling.frequency_penalty"),
    ({"stop": ["a", ""]}, "sampling.stop[1]"),
    ({"stop": ["ü" * 513]}, "sampling.stop[0]"),
    ({"stop_token_ids": range(65)}, "sampling.stop_token_ids"),
    ({"logprobs": 21}, "sampling.logprobs"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias"),
    ({"logit_bias": {5: math.nan}}, "sampling.logit_bias[5]"),
]

BAD_ENVELOPES = [
    (rag(n=0), "n"),
    (rag(n=17), "n"),
    (rag(attention=9), "attention"),
    (rag(priority=7), "priority"),
    (rag(truncation=prompt_pb2.Truncation(side=11)), "truncation.side"),
    (rag(truncation=prompt_pb2.Truncation(max_prompt_tokens=0)), "truncation.max_prompt_tokens"),
    (rag(request_id="x" * 129), "request_id"),
    (rag(request_id="a\nb"), "request_id"),
    (rag(timeout_ms=0), "timeout_ms"),
    (rag(tenant="x" * 129), "tenant"),
    (rag(tenant="a\x00"), "tenant"),
    (resumed(), "resume.samples"),
    (resumed({"sample_index": 0}, seed=None), "sampling.seed"),
    (resumed({"sample_index": 0}, fingerprint="12"), "resume.model_fingerprint"),
    (resumed({"sample_index": 1}), "resume.samples[0].sample_index"),
    (resumed({"sample_index": 1}, {"sample_index": 1}, n=2), "resume.samples[1].sample_index"),
    (resumed({"token_ids": [1, 2, 3]}), "resume.samples[0].token_ids"),
]


def shaped(**constraint: object) -> pb.GenerateRequest:
    return rag(structured_output=sampling_pb2.StructuredOutput(**constraint))


def options(*given: str) -> sampling_pb2.StructuredOutput.Choice:
    return sampling_pb2.StructuredOutput.Choice(options=given)


# Field after `structured_output`, and the facts that the error must give.
BAD_STRUCTURED = [
    (shaped(), "", set()),
    (shaped(json_schema=""), ".json_schema", set()),
    (shaped(json_schema=" \n"), ".json_schema", set()),
    (shaped(json_schema="{"), ".json_schema", {"value"}),
    (shaped(json_schema="type: object"), ".json_schema", {"value"}),
    (shaped(json_schema="[" * 65_000), ".json_schema", set()),
    (shaped(json_schema="[]"), ".json_schema", {"value"}),
    (shaped(json_schema="false"), ".json_schema", {"value"}),
    (shaped(json_schema="null"), ".json_schema", {"value"}),
    (shaped(json_schema="9" * 5000), ".json_schema", {"value"}),
    (shaped(json_schema='{"a": "%s"}' % ("x" * 65_536)), ".json_schema", {"limit", "value"}),
    (shaped(regex=""), ".regex", set()),
    (shaped(regex="ü" * 32_769), ".regex", {"limit", "value"}),
    (shaped(grammar="\n"), ".grammar", set()),
    (shaped(grammar="x" * 16_385), ".grammar", {"limit", "value"}),
    (shaped(choice=options()), ".choice.options", {"limit", "value"}),
    (shaped(choice=options("a", "")), ".choice.options[1]", set()),
    (shaped(choice=options(*["a"] * 1025)), ".choice.options", {"limit", "value"}),
    (shaped(choice=options("x" * 65_000, "x" * 537)), ".choice.options", {"limit", "value"}),
]

GOOD = [
    rag(),
    rag(Document(title="Title", utf8_text="Mörtel".encode())),
    rag(Document(block_key=KEY.upper())),
    rag(text, text),
    blocks(last),
    blocks(BlockInput(text="\n\n"), BlockInput(block_key=KEY), last),
    chat(user),
    chat(Message(role="system", content=""), user, documents=(text,)),
    rag(n=1, request_id="x" * 128, timeout_ms=1, attention=prompt_pb2.ATTENTION_FULL, store_full_block=True),
    sampled(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, max_new_tokens=1, min_new_tokens=1),
    sampled(temperature=2.0, top_p=0.1, top_k=50, min_p=1.0, ignore_eos=True, min_new_tokens=128),
    sampled(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0),
    sampled(stop=["s"] * 64, stop_token_ids=range(64)),
    sampled(repetition_penalty=1.3, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias={5: -100.0}, logprobs=20),
    rag(n=16, keep_tail=True),
    resumed({"token_ids": [1]}, {"sample_index": 1, "finished": True}, n=2),
    shaped(json_schema='{"type": "object"}'),
    shaped(json_schema="true"),
    shaped(regex="a+"),
    shaped(grammar='root ::= "a"'),
    shaped(choice=options(" ", "no")),
    rag(
        structured_output=sampling_pb2.StructuredOutput(regex="a+"),
        sampling=sampling_pb2.SamplingParams(ignore_eos=True, min_new_tokens=9),
    ),
]


@pytest.mark.parametrize(("request_", "reason", "field"), BAD_PROMPTS)
def test_bad_prompt_names_its_field(request_: pb.GenerateRequest, reason: Reason, field: str):
    with pytest.raises(InvalidRequestError) as raised:
        validate(request_, LIMITS)
    assert (raised.value.reason, raised.value.field) == (reason, field)
    assert raised.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize(("fields", "field"), BAD_SAMPLING)
def test_bad_sampling_names_field_limit_and_value(fields: dict[str, object], field: str):
    with pytest.raises(InvalidRequestError) as raised:
        validate(sampled(**fields), LIMITS)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_SAMPLING, field)
    assert fields == {"stop": ["a", ""]} or raised.value.metadata.keys() == {"field", "limit", "value"}


@pytest.mark.parametrize(("request_", "field"), BAD_ENVELOPES)
def test_bad_envelope_names_its_field(request_: pb.GenerateRequest, field: str):
    with pytest.raises(InvalidRequestError) as raised:
        validate(request_, LIMITS)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_FIELD, field)


@pytest.mark.parametrize(("request_", "field", "facts"), BAD_STRUCTURED)
def test_a_bad_constraint_names_field_limit_and_value(request_: pb.GenerateRequest, field: str, facts: set[str]):
    with pytest.raises(InvalidRequestError) as raised:
        validate(request_, LIMITS)
    expected = (Reason.INVALID_STRUCTURED_OUTPUT, f"structured_output{field}")
    assert (raised.value.reason, raised.value.field) == expected
    assert raised.value.metadata.keys() == {"field", *facts}
    assert len(raised.value.message) < 300


@pytest.mark.parametrize("request_", GOOD)
def test_good_request_passes(request_: pb.GenerateRequest):
    validate(request_, LIMITS)


def test_too_many_stop_strings():
    with pytest.raises(InvalidRequestError) as raised:
        validate(sampled(stop=["s"] * 65), LIMITS)
    assert raised.value.reason == Reason.TOO_MANY_STOP_STRINGS
    assert raised.value.metadata == {"field": "sampling.stop", "limit": "64", "value": "65"}


def test_ten_megabytes_meet_the_default_limit():
    with pytest.raises(InvalidRequestError) as raised:
        validate(rag(Document(text="x" * 10_000_000)), PromptLimits())
    assert raised.value.metadata == {"field": "rag.documents[0].text", "limit": "1048576", "value": "10000000"}


def test_instructions_have_a_limit():
    prompt = prompt_pb2.RagPrompt(documents=[text], question="Why?", instructions="x" * 9)
    with pytest.raises(InvalidRequestError) as raised:
        validate(pb.GenerateRequest(rag=prompt), PromptLimits(max_instructions_bytes=8))
    assert (raised.value.reason, raised.value.field) == (Reason.DOCUMENT_TOO_LARGE, "rag.instructions")


def test_utf8_error_says_where():
    with pytest.raises(InvalidRequestError, match="byte offset 2; value 0xff"):
        validate(rag(Document(utf8_text=b"ab\xffc")), LIMITS)


def test_filled_sampling_writes_every_default_and_keeps_what_is_given():
    filled = filled_sampling(sampled(temperature=0.5, stop=["a"], stop_token_ids=[3]), seed=11)
    assert (filled.max_new_tokens, filled.temperature, filled.top_p, filled.top_k) == (128, 0.5, 1.0, 0)
    assert (filled.seed, list(filled.stop), list(filled.stop_token_ids)) == (11, ["a"], [3])
    unset = {field.name for field in filled.DESCRIPTOR.fields if field.has_presence and not filled.HasField(field.name)}
    assert unset == {"logprobs"}
    assert filled_sampling(sampled(seed=0), seed=11).seed == 0


def test_filled_sampling_leaves_the_request_alone():
    request = sampled()
    filled_sampling(request, seed=1)
    assert request == sampled()


def test_block_keys_are_distinct_in_order_and_lower_case():
    other = "f" * 64
    given = [Document(block_key=key) for key in (other.upper(), KEY, other)]
    assert block_keys_in(rag(text, *given)) == [other, KEY]
    assert block_keys_in(chat(user, documents=tuple(given))) == [other, KEY]
    assert block_keys_in(blocks(BlockInput(block_key=KEY), last)) == [KEY]
    assert block_keys_in(pb.GenerateRequest()) == []
