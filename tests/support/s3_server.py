"""A real S3 protocol server, and a line to it that can be cut, blocked and let down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from moto.server import ThreadedMotoServer

from prefill_worker.tiers.locations import Patience, open_location
from tests.support.object_parts import QUICK

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class S3Server:
    """moto's server in a thread of this process."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310 - our own
            pass

    def close(self) -> None:
        self._server.stop()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server for as long as it is needed."""
    server = S3Server()
    try:
        yield server
    finally:
        server.close()


def open_bucket(port: int, bucket: str, patience: Patience = QUICK) -> ObjectStore:
    """A bucket behind a port of this machine, blocks under a prefix of it."""
    options = {
        "region": "us-east-1",
        "endpoint": f"http://127.0.0.1:{port}",
        "access_key_id": "test",
        "secret_access_key": "test",
        "allow_http": "true",
    }
    return open_location(f"s3://{bucket}/drystone", options, patience=patience)


class Line:
    """Bytes between clients and one server, both ways, until a test does something to them.

    Attributes:
        sent: Bytes that clients have sent, in all.
        received: Bytes that they have received.
        cut_up: Every connection is reset once its client has sent so many bytes.
        cut_down: Likewise for received bytes.
        flows: While it is not set nothing passes, and nothing is said either.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.sent = self.received = 0
        self.cut_up: int | None = None
        self.cut_down: int | None = None
        self.flows = asyncio.Event()
        self.flows.set()

    async def up(self) -> None:
        """Listens, always at the same port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuses connections and resets those that are open."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        pair = (writer, back)
        self._open.update(pair)
        for source, sink, up in ((reader, back, True), (there, writer, False)):
            task = asyncio.create_task(self._pass(source, sink, pair, up=up))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        *,
        up: bool,
    ) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await source.read(4096):
                await self.flows.wait()
                limit = self.cut_up if up else self.cut_down
                data = data if limit is None else data[: max(0, limit - passed)]
                passed += len(data)
                self.sent += len(data) if up else 0
                self.received += 0 if up else len(data)
                sink.write(data)
                await sink.drain()
                if limit is not None and passed >= limit:
                    break
        for writer in pair:
            # What has been written goes out first, so that the other side has exactly so many bytes.
            writer.close()
            self._open.discard(writer)


@contextlib.asynccontextmanager
async def line_to(port: int) -> AsyncIterator[Line]:
    """A line that stands at first."""
    line = Line(port)
    await line.up()
    try:
        yield line
    finally:
        await line.down()
