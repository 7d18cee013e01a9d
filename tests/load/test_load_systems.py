"""The HTTP client of peers, against a real server that speaks as each peer does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest

from tests.load.peers.llama_cpp import LlamaCpp
from tests.load.peers.peer import Peer
from tests.load.peers.server import Server
from tests.load.peers.transformers_cb import TransformersCb
from tests.load.peers.vllm import Vllm
from tests.load.systems import MeasureError, PeerSystem
from tests.load.workload import Prompt

PROMPT = Prompt(blocks=("a ", "b ", "c"), ids=(5, 6, 7))
USAGE = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
VLLM: list[dict[str, Any]] = [
    {"choices": [{"text": "x"}], "usage": USAGE | {"completion_tokens": 1}},
    {"choices": [{"text": "yz"}], "usage": USAGE | {"completion_tokens": 3}},
    {"choices": [], "usage": USAGE | {"completion_tokens": 3}},
]
LLAMA_CPP: list[dict[str, Any]] = [
    {"content": "x", "tokens_predicted": 1, "tokens_evaluated": 3, "stop": False},
    {"content": "y", "tokens_predicted": 2, "tokens_evaluated": 3, "stop": False},
    {"content": "z", "tokens_predicted": 3, "tokens_evaluated": 3, "stop": False},
    {"content": "", "tokens_predicted": 3, "tokens_evaluated": 3, "stop": True, "timings": {"cache_n": 2}},
]
TRANSFORMERS: list[dict[str, Any]] = [
    *({"choices": [{"text": text}]} for text in ("x", "y", "z")),
    {"choices": [{"text": ""}], "usage": {"prompt_tokens": 3, "completion_tokens": 3}},
]


class Talker(ThreadingHTTPServer):
    """Answers every request with the same events, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.events: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        talker = cast("Talker", self.server)
        body = self.rfile.read(int(self.headers["content-length"]))
        talker.asked.append((self.path, json.loads(body)))
        self.send_response(talker.status)
        self.end_headers()
        for event in talker.events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def talker() -> Iterator[Talker]:
    with Talker() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def system(peer: Peer, talker: Talker) -> PeerSystem:
    return PeerSystem(peer, cast("Server", talker))


@pytest.mark.parametrize(
    ("peer", "events", "cached"),
    [(Vllm(), VLLM, 2), (LlamaCpp("bf16"), LLAMA_CPP, 2), (TransformersCb(), TRANSFORMERS, None)],
    ids=lambda given: given.name if hasattr(given, "name") else "",
)
async def test_tokens_are_counted_as_the_peer_counts_them(
    talker: Talker, peer: Peer, events: list[dict[str, Any]], cached: int | None
) -> None:
    talker.events = events
    stream = await system(peer, talker).ask(PROMPT, 3)
    assert (stream.tokens, stream.prompt_tokens, stream.cached_tokens) == (3, 3, cached)
    assert len(stream.gaps) == 2
    [(path, body)] = talker.asked
    assert path == peer.path
    assert body["prompt"] in ([5, 6, 7], "a b c")


async def test_fewer_tokens_than_asked_for_are_no_figure(talker: Talker) -> None:
    talker.events = VLLM
    with pytest.raises(MeasureError, match="3 tokens came, 4 were asked for"):
        await system(Vllm(), talker).ask(PROMPT, 4)


async def test_another_prompt_than_ours_is_no_figure(talker: Talker) -> None:
    talker.events = [{"usage": {"prompt_tokens": 40, "completion_tokens": 3}}]
    with pytest.raises(MeasureError, match="read 40 prompt tokens, 3 were sent"):
        await system(Vllm(), talker).ask(PROMPT, 3)


async def test_a_refusal_is_told(talker: Talker) -> None:
    talker.status = 503
    with pytest.raises(MeasureError, match="vllm: 503"):
        await system(Vllm(), talker).ask(PROMPT, 3)


async def test_an_error_within_the_stream_is_told(talker: Talker) -> None:
    talker.events = [{"error": "out of blocks"}]
    with pytest.raises(MeasureError, match="out of blocks"):
        await system(TransformersCb(), talker).ask(PROMPT, 3)


async def test_a_server_that_is_gone_is_told() -> None:
    with Talker() as gone:
        pass
    with pytest.raises(MeasureError, match="vllm: ConnectError"):
        await system(Vllm(), gone).ask(PROMPT, 3)
