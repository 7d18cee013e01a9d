"""Links to decode workers, one for each life of each worker."""

from __future__ import annotations

import asyncio

import zmq.asyncio

from prefill_worker.link import Link, LinkBrokenError, Shipped
from prefill_worker.tiers.block import StoredBlock
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import Compatibility, KvEndpoint, Reservation, WorkerIdentity
from shared.kv.layout import KvShape


class Shipper:
    """Owns every link of a prefill worker. Used by the event loop alone."""

    def __init__(
        self, identity: WorkerIdentity, compatibility: Compatibility, shape: KvShape, timeout_seconds: float
    ) -> None:
        self._identity = identity
        self._compatibility = compatibility
        self._shape = shape
        self._timeout = timeout_seconds
        self._context = zmq.asyncio.Context()
        self._links: dict[tuple[str, int], asyncio.Task[Link]] = {}
        self.shipped_bytes = self.resent_total = 0

    async def ship(self, block: StoredBlock, reservation: Reservation, endpoint: KvEndpoint) -> Shipped:
        """Ships a block; a link that failed is closed, so that the next transfer makes a new one."""
        name = (endpoint.zmq_address, reservation.worker.incarnation)
        opening = self._links.get(name)
        if opening is None or _has_failed(opening):
            await self._close_predecessors(endpoint.zmq_address, reservation.worker.incarnation)
            opening = self._links.get(name)
            if opening is None or _has_failed(opening):
                opening = self._links[name] = asyncio.create_task(self._open(endpoint, reservation.worker))
        try:
            link = await asyncio.shield(opening)
        except DrystoneError:
            await self._discard(name, opening)
            raise
        try:
            shipped = await link.ship(block, reservation)
        except LinkBrokenError:
            await self._discard(name, opening)
            raise
        self.shipped_bytes += shipped.bytes
        self.resent_total += shipped.chunks_resent
        return shipped

    async def _open(self, endpoint: KvEndpoint, receiver: WorkerIdentity) -> Link:
        link = Link(self._context, endpoint.zmq_address, self._shape, self._timeout)
        try:
            await link.hello(self._identity, receiver, self._compatibility)
        except BaseException:
            await link.close()
            raise
        return link

    async def _close_predecessors(self, address: str, incarnation: int) -> None:
        """Links to earlier lives of a worker would reconnect to the new one for ever."""
        for name, opening in list(self._links.items()):
            if name[0] == address and name[1] != incarnation and opening.done():
                await self._discard(name, opening)

    async def _discard(self, name: tuple[str, int], opening: asyncio.Task[Link]) -> None:
        if self._links.get(name) is opening:
            del self._links[name]
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()

    async def close(self) -> None:
        """Closes every link."""
        links, self._links = self._links, {}
        for opening in links.values():
            opening.cancel()
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                await opening.result().close()
        self._context.term()


def _has_failed(opening: asyncio.Task[Link]) -> bool:
    """True for a link that could not be opened, where whoever asked for it had gone by then."""
    return opening.done() and (opening.cancelled() or opening.exception() is not None)
