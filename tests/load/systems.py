"""The servers under measurement, behind one face: ask, and see every token arrive."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol

import httpx2

from drystone import AsyncClient, Completed, Started, TextDelta
from tests.load.peers.peer import Peer
from tests.load.peers.server import Server
from tests.load.streams import Arrival, TokenStream
from tests.load.workload import Prompt

TIMEOUT_SECONDS: Final = 900.0
# Ids that servers make of the same text may differ where blocks meet: they tokenise it as one, Drystone block by block.
_SEAM_TOKENS: Final = 12


class MeasureError(Exception):
    """A server did not answer what it was asked; the message says how."""


class System(Protocol):
    """A running server."""

    @property
    def name(self) -> str:
        """Name in tables."""

    async def ask(self, prompt: Prompt, tokens: int) -> TokenStream:
        """Generates exactly `tokens` greedy tokens.

        Raises:
            MeasureError: The server refused, broke off, or did other work than was asked.
        """

    def pause(self) -> None:
        """Leaves the cores to others."""

    def resume(self) -> None:
        """Takes requests again."""


class PeerSystem:
    """A peer over HTTP. Every request has a connection of its own: a paused server keeps none alive.

    Args:
        peer: What it is.
        server: Its process.
    """

    def __init__(self, peer: Peer, server: Server) -> None:
        self.name = peer.name
        self._peer = peer
        self._server = server

    async def ask(self, prompt: Prompt, tokens: int) -> TokenStream:
        """Server-sent events, one or more tokens each."""
        try:
            return await self._ask(prompt, tokens)
        except httpx2.HTTPError as error:
            raise MeasureError(f"{self.name}: {error!r}") from error

    def pause(self) -> None:
        """Stops its processes."""
        self._server.pause()

    def resume(self) -> None:
        """Continues them."""
        self._server.resume()

    async def _ask(self, prompt: Prompt, tokens: int) -> TokenStream:
        body = self._peer.body(prompt.text, prompt.ids, tokens)
        arrivals: list[Arrival] = []
        prompt_tokens, cached = 0, None
        async with httpx2.AsyncClient(
            base_url=self._server.base_url, trust_env=False, timeout=TIMEOUT_SECONDS
        ) as client:
            sent = time.perf_counter()
            async with client.stream("POST", self._peer.path, json=body) as response:
                if not response.is_success:
                    raise MeasureError(f"{self.name}: {response.status_code} {(await response.aread())[:500]!r}")
                async for line in response.aiter_lines():
                    now = time.perf_counter()
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    event = json.loads(line.removeprefix("data:"))
                    if "error" in event:
                        raise MeasureError(f"{self.name}: {event['error']}")
                    chunk = self._peer.read(event)
                    before = arrivals[-1].tokens if arrivals else 0
                    total = before + chunk.new_tokens if chunk.total_tokens is None else chunk.total_tokens
                    if total > before:
                        arrivals.append(Arrival(now, total))
                    prompt_tokens = prompt_tokens if chunk.prompt_tokens is None else chunk.prompt_tokens
                    cached = cached if chunk.cached_tokens is None else chunk.cached_tokens
        return _checked(self.name, TokenStream(sent, tuple(arrivals), prompt_tokens, cached), prompt, tokens)


class DrystoneSystem:
    """Drystone through its own client. Its idle processes sleep, so pausing does nothing.

    Args:
        client: Client of its gateway.
    """

    name = "drystone"

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def ask(self, prompt: Prompt, tokens: int) -> TokenStream:
        """The prompt as exact blocks."""
        arrivals: list[Arrival] = []
        prompt_tokens, cached = 0, None
        sent = time.perf_counter()
        async with self._client.stream(
            blocks=prompt.blocks, max_new_tokens=tokens, temperature=0.0, ignore_eos=True, timeout=TIMEOUT_SECONDS
        ) as stream:
            async for event in stream:
                now = time.perf_counter()
                match event:
                    case TextDelta(token_ids=ids) if ids:
                        arrivals.append(Arrival(now, (arrivals[-1].tokens if arrivals else 0) + len(ids)))
                    case Started():
                        prompt_tokens = event.prompt_tokens
                    case Completed():
                        cached = event.usage.cached_tokens
        return _checked(self.name, TokenStream(sent, tuple(arrivals), prompt_tokens, cached), prompt, tokens)

    def pause(self) -> None:
        """Nothing."""

    def resume(self) -> None:
        """Nothing."""


@asynccontextmanager
async def alone(system: System) -> AsyncIterator[System]:
    """A system that runs while the others are paused."""
    system.resume()
    try:
        yield system
    finally:
        system.pause()


def _checked(name: str, stream: TokenStream, prompt: Prompt, tokens: int) -> TokenStream:
    if not stream.arrivals or stream.tokens != tokens:
        came = stream.tokens if stream.arrivals else 0
        raise MeasureError(f"{name}: {came} tokens came, {tokens} were asked for")
    if abs(stream.prompt_tokens - len(prompt.ids)) > _SEAM_TOKENS:
        raise MeasureError(f"{name}: read {stream.prompt_tokens} prompt tokens, {len(prompt.ids)} were sent")
    return stream
