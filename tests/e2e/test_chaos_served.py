"""A served Drystone over a wire that does everything wrong: every answer is the undisturbed one, or a reason.

`DRYSTONE_CHAOS=2000` asks for so many answers.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import Any
from unittest.mock import Mock

import pytest

import drystone
from drystone import Document
from tests.conftest import MakeFolder
from tests.support.chaos import Chaos
from tests.support.stacks import Served, serving
from tests.support.wire import Relay

REQUESTS = int(os.environ.get("DRYSTONE_CHAOS", "60"))
_DISTINCT = 40
_AT_ONCE = 6
# Beyond the client's own deadline: whatever is not over by then hangs.
_HANGS_SECONDS = 60.0


def prompts(seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    texts = [f"Passage {number}. " + "stone wall " * (20 + 9 * (number % 30)) for number in range(30)]
    return [
        {
            "question": "Which stone? " * draw.choice([1, 2, 5]),
            "documents": [Document(text=text) for text in draw.sample(texts, draw.randint(1, 4))],
            "max_new_tokens": draw.randint(1, 6),
            "ignore_eos": True,
        }
        for _ in range(_DISTINCT)
    ]


async def asked(served: Served, prompt: dict[str, Any]) -> list[int] | str:
    """Token ids of the answer, or the reason why there is none."""
    async with asyncio.timeout(_HANGS_SECONDS):
        try:
            return list((await served.client.generate(**prompt)).token_ids)
        except drystone.DrystoneError as error:
            return str(error.reason)


async def test_every_answer_is_the_undisturbed_one_or_a_reason(tiny_folder: MakeFolder) -> None:
    asks, draw, outcomes = prompts(1), random.Random(2), Counter[str]()
    chaos = Chaos(3)
    async with serving(
        tiny_folder(),
        decode_settings={"fetch_stall_seconds": 1.0},
        prefill_settings={"ship_timeout_seconds": 1.0},
    ) as served:
        expected = [await asked(served, prompt) for prompt in asks]
        assert all(isinstance(tokens, list) for tokens in expected)
        [decode], [prefill] = served.stack.decode_apps, served.stack.prefill_apps
        relay = Relay(decode._endpoint.zmq_address)
        relay.there, relay.back = chaos.there, chaos.back
        direct = decode._endpoint.zmq_address, decode._endpoint.ipc_address
        decode._endpoint.zmq_address, decode._endpoint.ipc_address = relay.address, ""

        async def one(index: int) -> None:
            answer = await asked(served, asks[index])
            wrong = isinstance(answer, list) and answer != expected[index]
            outcomes["wrong" if wrong else "right" if isinstance(answer, list) else str(answer)] += 1

        for begin in range(0, REQUESTS, _AT_ONCE):
            while decode.pool.blocks.evict_one():  # so that blocks travel again
                pass
            if draw.random() < 0.05:
                await relay.reconnect()
            relay.pause = 0.2 if draw.random() < 0.1 else 0.0
            count = min(_AT_ONCE, REQUESTS - begin)
            await asyncio.gather(*(one(draw.randrange(_DISTINCT)) for _ in range(count)))
        print(dict(outcomes), dict(decode.receiver.refused), dict(prefill.shipper.resent))  # noqa: T201 - of the proof
        assert outcomes["wrong"] == 0
        assert outcomes.total() == REQUESTS
        assert outcomes["right"] > 0.9 * REQUESTS
        assert decode.receiver.refused_total > REQUESTS // 10
        decode._endpoint.zmq_address, decode._endpoint.ipc_address = direct
        await relay.close()


@pytest.mark.parametrize(
    ("field", "value"), [("protocol_version", 99), ("model_fingerprint", b"another model's"), ("dtype", "float16")]
)
async def test_kv_of_another_kind_is_refused_by_name_and_counted(
    field: str, value: object, tiny_folder: MakeFolder
) -> None:
    async with serving(tiny_folder()) as served:
        [decode], [prefill] = served.stack.decode_apps, served.stack.prefill_apps
        expected = await asked(served, prompts(1)[0])
        served.evict_everywhere()
        log = decode.receiver._log = Mock()
        prefill.shipper._reactor.call(prefill.shipper._break_all)
        setattr(prefill.shipper._compatibility, field, value)
        answer = await served.client.generate(**prompts(1)[0])
        assert list(answer.token_ids) == expected
        sources = {one.source for one in answer.blocks}
        assert "encoded_on_decode" in sources
        assert "shipped" not in sources
        assert log.warning.call_args.args == ("incompatible_sender",)
        assert log.warning.call_args.kwargs["field"] == field
        assert decode.receiver.refused["INCOMPATIBLE"] >= 1
        counted = decode._metrics.registry.get_sample_value(
            "drystone_kv_chunks_refused_total", {"reason": "incompatible"}
        )
        assert counted is not None
        assert counted >= 1
