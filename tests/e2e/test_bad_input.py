"""Whatever a client sends: a status with a reason, a field and a limit, and the next request is served."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt, ChatMessage, ChatPrompt, Document, RagPrompt
from drystone.v1.sampling_pb2 import SamplingParams
from shared.errors import REASONS, Reason
from tests.support.errors import Failure, failure_of
from tests.support.stacks import Served

pytestmark = pytest.mark.asyncio(loop_scope="module")

Request = v1.GenerateRequest
NAN, INF = float("nan"), float("inf")
UNKNOWN_KEY = "ab" * 32


def rag(*documents: Document, question: str = "Which?", **rest: Any) -> Request:
    return Request(rag=RagPrompt(documents=documents, question=question), **rest)


def blocks(*texts: str, **rest: Any) -> Request:
    return Request(blocks=BlocksPrompt(blocks=[BlockInput(text=text) for text in texts]), **rest)


def sampling(**values: Any) -> Request:
    return blocks("alpha", "beta", sampling=SamplingParams(**values))


def text(content: str = "alpha", title: str = "") -> Document:
    return Document(title=title, text=content)


# Name: request, reason, field, limit, value. A field of None: the error names none.
TABLE: dict[str, tuple[Request, Reason, str | None, str | None, str | None]] = {
    "no prompt": (Request(), Reason.EMPTY_PROMPT, "prompt", None, None),
    "empty question": (rag(text(), question=" \n"), Reason.EMPTY_PROMPT, "rag.question", None, None),
    "no blocks": (Request(blocks=BlocksPrompt()), Reason.EMPTY_PROMPT, "blocks.blocks", None, None),
    "last block empty": (blocks("alpha", ""), Reason.EMPTY_PROMPT, "blocks.blocks[1].text", None, None),
    "no messages": (Request(chat=ChatPrompt()), Reason.EMPTY_PROMPT, "chat.messages", None, None),
    "empty message": (
        Request(chat=ChatPrompt(messages=[ChatMessage(role="user")])),
        Reason.EMPTY_PROMPT,
        "chat.messages[0].content",
        None,
        None,
    ),
    "no documents": (rag(), Reason.NO_DOCUMENTS, "rag.documents", None, None),
    "empty document": (rag(text(), text("")), Reason.EMPTY_DOCUMENT, "rag.documents[1].text", None, None),
    "document without content": (rag(Document(title="a")), Reason.EMPTY_DOCUMENT, "rag.documents[0]", None, None),
    "empty block": (blocks("", "beta"), Reason.EMPTY_DOCUMENT, "blocks.blocks[0].text", None, None),
    "10 MB document": (
        rag(text("wall " * 2_000_000)),
        Reason.DOCUMENT_TOO_LARGE,
        "rag.documents[0].text",
        str(1 << 20),
        "10000000",
    ),
    "1025 documents": (rag(*[text()] * 1025), Reason.TOO_MANY_DOCUMENTS, "rag.documents", "1024", "1025"),
    "too many tokens": (blocks("wall " * 10_000, "beta"), Reason.PROMPT_TOO_LONG, None, None, None),
    "too many new tokens": (
        sampling(max_new_tokens=9000),
        Reason.INVALID_SAMPLING,
        "sampling.max_new_tokens",
        "8191",
        "9000",
    ),
    "not UTF-8": (
        rag(Document(utf8_text=b"wall \xff\xfe")),
        Reason.INVALID_UTF8,
        "rag.documents[0].utf8_text",
        None,
        "0xff",
    ),
    "unknown model": (blocks("a", "b", model="gpt-17"), Reason.UNKNOWN_MODEL, "model", None, "gpt-17"),
    "key that is none": (
        rag(Document(block_key="zz")),
        Reason.INVALID_BLOCK_KEY,
        "rag.documents[0].block_key",
        "64",
        "'zz'",
    ),
    "unknown key": (
        rag(Document(block_key=UNKNOWN_KEY)),
        Reason.UNKNOWN_BLOCK_KEY,
        "rag.documents[0].block_key",
        None,
        UNKNOWN_KEY,
    ),
    "65 stop strings": (
        sampling(stop=[str(number) for number in range(65)]),
        Reason.TOO_MANY_STOP_STRINGS,
        "sampling.stop",
        "64",
        "65",
    ),
    "empty stop string": (sampling(stop=["a", ""]), Reason.INVALID_SAMPLING, "sampling.stop[1]", None, None),
    "no new tokens": (sampling(max_new_tokens=0), Reason.INVALID_SAMPLING, "sampling.max_new_tokens", ">= 1", "0"),
    "negative temperature": (sampling(temperature=-1), Reason.INVALID_SAMPLING, "sampling.temperature", ">= 0", "-1.0"),
    "NaN temperature": (sampling(temperature=NAN), Reason.INVALID_SAMPLING, "sampling.temperature", ">= 0", "nan"),
    "endless temperature": (sampling(temperature=INF), Reason.INVALID_SAMPLING, "sampling.temperature", ">= 0", "inf"),
    "top_p of 0": (sampling(top_p=0), Reason.INVALID_SAMPLING, "sampling.top_p", "(0, 1]", "0.0"),
    "top_p of 2": (sampling(top_p=2), Reason.INVALID_SAMPLING, "sampling.top_p", "(0, 1]", "2.0"),
    "NaN top_p": (sampling(top_p=NAN), Reason.INVALID_SAMPLING, "sampling.top_p", "(0, 1]", "nan"),
    "NaN min_p": (sampling(min_p=NAN), Reason.INVALID_SAMPLING, "sampling.min_p", "[0, 1]", "nan"),
    "huge top_k": (sampling(top_k=2**32 - 1), Reason.INVALID_SAMPLING, "sampling.top_k", str(2**31 - 1), None),
    "unknown template": (
        blocks("a", "b", template={"name": "latin"}),
        Reason.INVALID_TEMPLATE,
        "template.name",
        None,
        "'latin'",
    ),
    "unknown attention": (blocks("a", "b", attention=9), Reason.INVALID_FIELD, "attention", "0 to 2", "9"),
    "request id of 129": (blocks("a", "b", request_id="x" * 129), Reason.INVALID_FIELD, "request_id", "128", "129"),
    "no time": (blocks("a", "b", timeout_ms=0), Reason.INVALID_FIELD, "timeout_ms", ">= 1", "0"),
    "tenant of 129": (blocks("a", "b", tenant="x" * 129), Reason.INVALID_FIELD, "tenant", "128", "129"),
}


async def ask(served: Served, request: Request) -> list[v1.GenerateResponse]:
    return [event async for event in served.raw.Generate(request, timeout=20.0)]


async def assert_next_is_served(served: Served) -> None:
    answer = await served.client.generate(blocks=["alpha", "beta"], max_new_tokens=2)
    assert answer.usage.completion_tokens == 2
    await served.until_idle()


@pytest.mark.parametrize("name", TABLE)
async def test_a_bad_request_is_told_what_is_wrong(served: Served, name: str) -> None:
    request, reason, field, limit, value = TABLE[name]
    failure = await failure_of(ask(served, request))
    assert failure.reason == reason
    assert failure.code is REASONS[reason].status
    if field is not None:
        assert failure.fields == (field,)
        assert failure.metadata["field"] == field
    for fact, expected in (("limit", limit), ("value", value)):
        if expected is not None:
            assert failure.metadata[fact] == expected
            assert expected in failure.message
    assert len(failure.message) < 1000
    assert failure.retry_ms is None
    await assert_next_is_served(served)


async def test_too_many_tokens_says_both_numbers(served: Served) -> None:
    failure = await failure_of(ask(served, TABLE["too many tokens"][0]))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.fields
    assert int(failure.metadata["value"]) > int(failure.metadata["limit"]) > 0


async def send_bytes(served: Served, raw: bytes, method: str = "Generate") -> Failure:
    call = served.channel.unary_stream(f"/drystone.v1.Generation/{method}")

    async def read() -> list[bytes]:
        return [event async for event in call(raw, timeout=20.0)]

    return await failure_of(read())


async def test_bytes_that_are_no_request(served: Served) -> None:
    generator = random.Random(4)
    for raw in (b"\xff", b"\x12\xff\xff\xff\xff\x0f", generator.randbytes(50), generator.randbytes(5000)):
        failure = await send_bytes(served, raw)
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.reason == Reason.MALFORMED_REQUEST
        assert "decoded" in failure.message
    await assert_next_is_served(served)


async def test_text_that_is_not_utf8_on_the_wire(served: Served) -> None:
    good = rag(text("SPLICE")).SerializeToString()
    failure = await send_bytes(served, good.replace(b"SPLICE", b"SP\xff\xfeCE"))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason in (Reason.MALFORMED_REQUEST, Reason.INVALID_UTF8)
    await assert_next_is_served(served)


async def test_a_truncated_or_damaged_request_never_breaks_the_server(served: Served) -> None:
    good = rag(text("alpha"), sampling=SamplingParams(max_new_tokens=1)).SerializeToString()
    generator = random.Random(5)
    call = served.channel.unary_stream("/drystone.v1.Generation/Generate")
    for _ in range(60):
        raw = bytearray(good[: generator.randrange(1, len(good) + 1)])
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        try:
            async for _ in call(bytes(raw), timeout=20.0):
                pass
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, UNIMPLEMENTED), error  # noqa: PT017 - either way is right
    await assert_next_is_served(served)


UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_beyond_the_limit_is_refused_by_size(served: Served) -> None:
    failure = await send_bytes(served, bytes(65 << 20))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await assert_next_is_served(served)


async def test_a_method_that_is_none(served: Served) -> None:
    failure = await send_bytes(served, b"", "Levitate")
    assert failure.code is grpc.StatusCode.UNIMPLEMENTED


async def test_garbage_on_a_workers_own_stream(served: Served) -> None:
    """What only gateways should send is read as carefully."""
    from shared.rpc.channel import open_channel

    async def garbage() -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff"

    channel = open_channel(served.stack.decode_apps[0].server.address)

    async def read() -> list[bytes]:
        call = channel.stream_stream("/drystone.internal.v1.Decode/Generate")
        return [event async for event in call(garbage(), timeout=5.0)]

    try:
        failure = await failure_of(read())
    finally:
        await channel.close()
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == Reason.MALFORMED_REQUEST
    await assert_next_is_served(served)


@pytest.mark.parametrize(
    "values",
    [
        {"stop_token_ids": [0, 398, 399], "min_new_tokens": 3},
        {"temperature": 1e-44, "min_p": 0.5},
        {"temperature": 3.4e38, "top_p": 1e-30},
        {"top_k": 2**31 - 1, "temperature": 1.0},
        {"seed": 2**64 - 1, "temperature": 1.0},
        {"stop": ["\0", "é" * 512]},
    ],
    ids=str,
)
async def test_values_at_the_edge_are_served_and_harm_nobody_beside_them(
    served: Served, values: dict[str, Any]
) -> None:
    alone = await served.client.generate(blocks=["alpha", "beta"], max_new_tokens=24, ignore_eos=True)
    async with served.client.stream(blocks=["alpha", "beta"], max_new_tokens=24, ignore_eos=True) as beside:
        await anext(beside)
        events = await ask(served, sampling(max_new_tokens=4, **values))
        assert events[-1].HasField("completed")
        answer = await beside.read()
    assert answer.token_ids == alone.token_ids
