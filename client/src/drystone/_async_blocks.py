"""The blocks of a cluster, for the asynchronous client. Its twin is _blocks.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from drystone import _block_info as blocks
from drystone._block_info import BlockInfo, BlockSelector, DeletedBlocks
from drystone.v1 import generation_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Unpack

    import grpc.aio

    from drystone.v1 import generation_pb2_grpc

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class _Call(Protocol):
    """How the client makes one call, with its deadline and its errors."""

    async def __call__(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request, seconds: float | None
    ) -> _Reply: ...


class AsyncBlocks:
    """What the cluster holds: look, pin, unpin, delete. `AsyncClient.blocks` is one.

    Example:
        >>> async with drystone.AsyncClient() as client:
        ...     async for block in client.blocks.list(key_prefix="3f"):
        ...         print(block)
        ...     await client.blocks.delete(tags=["old"])
    """

    def __init__(
        self, stub: Callable[[], generation_pb2_grpc.GenerationAsyncStub], call: _Call, timeout: float | None
    ) -> None:
        # A function: the channel opens with the first call, in the loop that runs then.
        self._stub = stub
        self._call = call
        self._timeout = timeout

    async def list(self, *, page_size: int = 0, **selector: Unpack[BlockSelector]) -> AsyncIterator[BlockInfo]:
        """Every block that the selector matches; each page is fetched when the one before is used up.

        Args:
            page_size: Most blocks in one reply. 0: the server's default.
            **selector: See `BlockSelector`; none at all means every block.

        Raises:
            DrystoneError: While iterating.
        """
        page_token = ""
        while True:
            request = blocks.page_request(page_size, page_token, selector)
            page = await self._call(self._stub().DescribeBlocks, request, self._timeout)
            for block in page.blocks:
                yield blocks.block_info(block)
            page_token = page.next_page_token
            if not page_token:
                return

    async def get(self, key: str, *, tenant: str = "", model: str = "") -> BlockInfo | None:
        """One block by its whole key; None when the cluster does not know it."""
        return await anext(self.list(keys=key, tenant=tenant, model=model), None)

    async def pin(self, **selector: Unpack[BlockSelector]) -> int:
        """Keeps blocks from eviction. Returns how many changed."""
        return await self._pin(selector, unpin=False)

    async def unpin(self, **selector: Unpack[BlockSelector]) -> int:
        """Lets blocks go again. Returns how many changed."""
        return await self._pin(selector, unpin=True)

    async def delete(self, **selector: Unpack[BlockSelector]) -> DeletedBlocks:
        """Removes blocks from every tier and every worker before it returns.

        Raises:
            InvalidRequestError: When the selector selects everything.
        """
        request = generation_pb2.DeleteBlocksRequest(selector=blocks.selector(selector))
        reply = await self._call(self._stub().DeleteBlocks, request, self._timeout)
        return DeletedBlocks(reply.blocks_deleted, reply.bytes_freed)

    async def _pin(self, selector: BlockSelector, *, unpin: bool) -> int:
        request = generation_pb2.PinBlocksRequest(selector=blocks.selector(selector), unpin=unpin)
        reply = await self._call(self._stub().PinBlocks, request, self._timeout)
        return reply.blocks_changed
