"""Keys for tests, and a pair of ends that have them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from decode_worker.receiving.listener import Listener
from decode_worker.receiving.receiver import Receiver
from decode_worker.request import Fetch
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.outgoing import Shipped
from prefill_worker.transfer.shipper import Shipper
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint
from shared.transfer.curve import ClientSecurity, ServerSecurity
from shared.transfer.keys import AllowedKeys, KeyPair, load_key_pair, make_key_file
from tests.support.decode_parts import make_pool, make_request
from tests.support.fake_workers import compatibility
from tests.support.wire import SENDER, SHAPE, TOKENS, told


@dataclass(frozen=True)
class Keys:
    """Key files of a sender and a receiver that allow each other."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def pair(self, name: str) -> KeyPair:
        """A worker's keys, made when first asked for."""
        return load_key_pair(self.file(name)) if self.file(name).exists() else make_key_file(self.file(name), name)

    def allowed(self, name: str, who: Iterable[str]) -> Path:
        """A file of the keys of these workers."""
        file = self.folder / f"{name}.allowed"
        file.write_text("".join(f"{self.pair(one).public} {one}\n" for one in who))
        file.chmod(0o600)
        return file

    def server(self, *who: str) -> ServerSecurity:
        """The receiver's security, for these senders."""
        return ServerSecurity(self.pair("receiver"), AllowedKeys(self.allowed("receiver", who)))

    def client(self, name: str = "sender") -> ClientSecurity:
        """A sender's security; it would send to the receiver."""
        return ClientSecurity(self.pair(name), AllowedKeys(self.allowed(name, ["receiver", "stranger"])))

    def secrets(self) -> list[str]:
        return [self.pair(file.name.removesuffix(".key")).secret for file in self.folder.glob("*.key")]


class Ends:
    """A receiver, and a sender without anything between them.

    Args:
        server: The receiver's security.
        client: The sender's.
        address: What the receiver binds.
    """

    def __init__(self, server: ServerSecurity | None, client: ClientSecurity | None, address: str) -> None:
        shape = {"layers": SHAPE.layers, "kv_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim}
        self.pool = make_pool(8 * TOKENS, SHAPE)
        self.committed: list[bytes] = []
        self.receiver = Receiver(
            self.pool.fetches,
            compatibility(**shape),
            SHAPE,
            view=lambda landing: self.pool.arena.bytes_of(landing.extent),
            committed=self._commit,
            security=server,
        )
        self.listener = Listener(
            self.receiver.context, SHAPE, address, server if address.startswith("tcp://") else None
        )
        self.receiver.listen(self.listener)
        self.receiver.start()
        self.shipper = Shipper(SENDER, compatibility(**shape), SHAPE, 10.0, security=client)

    def _commit(self, fetch: Fetch, size: int) -> None:
        del size
        self.committed.append(fetch.key)
        self.pool.commit(fetch)

    def endpoint(self, key: str = "") -> KvEndpoint:
        """Where the receiver takes KV, with a public key."""
        return KvEndpoint(zmq_address=self.listener.address, curve_public_key=key)

    async def ship(self, block: StoredBlock, endpoint: KvEndpoint) -> Shipped:
        """Ships a block that a request waits for; the request ends with it."""
        request = make_request([BlockRef(key=block.key, token_ids=block.token_ids, store=True)])
        assert self.pool.admit(request, may_move=True) is not None
        [fetch] = request.fetches
        try:
            async with asyncio.timeout(8.0):
                shipped = await self.shipper.ship(block, self.pool.fetches.reservation(fetch), endpoint)
                await told(self.receiver)
                return shipped
        finally:
            for one in self.pool.leave(request):
                one.restart()
            request.release()

    async def close(self) -> None:
        await self.shipper.close()
        assert self.receiver._reactor.defects_total == self.shipper._reactor.defects_total == 0
        self.receiver.close()


@contextlib.asynccontextmanager
async def ends(
    server: ServerSecurity | None, client: ClientSecurity | None, address: str = "tcp://127.0.0.1:0"
) -> AsyncIterator[Ends]:
    """Both ends, closed at the end."""
    both = Ends(server, client, address)
    try:
        yield both
    finally:
        await both.close()


@contextlib.contextmanager
def telling_no_secret(keys: Keys) -> Iterator[list[structlog.typing.EventDict]]:
    """Lines logged meanwhile; no secret key is in any of them."""
    wrapper = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    try:
        with structlog.testing.capture_logs() as lines:
            yield lines
    finally:
        structlog.configure(wrapper_class=wrapper)
    said = repr(lines)
    assert not any(secret in said for secret in keys.secrets())
