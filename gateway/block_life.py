"""The life of blocks over the whole cluster: described, pinned, deleted.

Workers know their own blocks; the gateway asks them all at once and puts together what they say. Deleting asks every
worker that it is configured with, because one that cannot be reached may hold the block on its disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.operations_pb2 import ProcessRole
from drystone.v1.statistics_pb2 import BlockSource
from gateway.accounting import OBJECT_STORE, SOURCES
from gateway.cluster import Cluster
from gateway.selectors import MAX_PAGE, page, refuse_everything, stored_request
from gateway.tenants import Tenants
from gateway.worker import Worker
from shared import logs
from shared.errors import DrystoneError, InvalidRequestError, Reason
from shared.internal.v1 import decode_pb2 as decode
from shared.internal.v1 import prefill_pb2 as prefill
from shared.internal.v1.common_pb2 import ShipSource
from shared.rpc.errors import from_rpc_error

_ASK_SECONDS = 30.0
MAX_SELECTED = 100_000
_AT_ONCE = 256
T = TypeVar("T")


class BlockLife:
    """What operators do to blocks, for one gateway."""

    def __init__(self, cluster: Cluster, tenants: Tenants) -> None:
        self._cluster = cluster
        self._tenants = tenants
        self._log = logs.get("blocks")

    async def describe(self, request: v1.DescribeBlocksRequest) -> v1.DescribeBlocksResponse:
        """One page of blocks, in the order of their keys.

        Raises:
            DrystoneError: The selector breaks a rule, or a worker in use does not answer.
        """
        wanted = stored_request(request.selector, self._tenants)
        size, after = page(request.page_size, request.page_token)
        found, more = await self._page(wanted, size, after)
        return v1.DescribeBlocksResponse(blocks=found, next_page_token=more.hex())

    async def pin(self, request: v1.PinBlocksRequest) -> int:
        """Pins the selected blocks wherever they are, or lets them go; how many changed anywhere.

        Raises:
            DrystoneError: The selector breaks a rule, or a worker in use does not answer.
        """
        if not request.unpin:
            refuse_everything(request.selector, self._tenants, "pinning")
        keys, changed = await self._selected(request.selector), 0
        for start in range(0, len(keys), _AT_ONCE):
            changed += await self._pin(keys[start : start + _AT_ONCE], unpin=request.unpin)
        return changed

    async def _pin(self, keys: list[bytes], *, unpin: bool) -> int:
        at_prefill = prefill.PinStoredRequest(keys=keys, unpin=unpin)
        at_decode = decode.PinResidentRequest(keys=keys, unpin=unpin)
        stored = await _all(w.prefill().PinBlocks(at_prefill, timeout=_ASK_SECONDS) for w in self._prefill())
        resident = await _all(w.decode().PinBlocks(at_decode, timeout=_ASK_SECONDS) for w in self._decode())
        changed = {bytes(key) for answer in stored for key in answer.changed}
        return len(changed.union(bytes(key) for answer in resident for key in answer.changed))

    async def delete(self, request: v1.DeleteBlocksRequest) -> v1.DeleteBlocksResponse:
        """Removes the selected blocks from every tier and every worker before it returns.

        Raises:
            DrystoneError: The selector breaks a rule; or a worker cannot be reached or could not remove them, and then
                some may be left: the same call may be made again.
        """
        refuse_everything(request.selector, self._tenants, "deleting")
        keys = await self._selected(request.selector)
        deleted, freed = set[bytes](), 0
        for start in range(0, len(keys), _AT_ONCE):
            gone, bytes_freed = await self._delete(keys[start : start + _AT_ONCE])
            deleted |= gone
            freed += bytes_freed
        self._log.info("deleted", blocks=len(deleted), bytes_freed=freed)
        return v1.DeleteBlocksResponse(blocks_deleted=len(deleted), bytes_freed=freed)

    async def _delete(self, keys: list[bytes]) -> tuple[set[bytes], int]:
        deleted, freed = set[bytes](), 0
        # Prefill workers first: they are where decode workers would get the block from again. Records last: by them the
        # same selector finds the blocks again, should one of the workers fail.
        kv_alone = prefill.DeleteStoredRequest(keys=keys, keep_records=True)
        at_prefill = prefill.DeleteStoredRequest(keys=keys)
        prefill_role = ProcessRole.PROCESS_ROLE_PREFILL
        stored = await self._on_every(prefill_role, lambda w: w.prefill().DeleteBlocks(kv_alone))
        at_decode = decode.DropResidentRequest(keys=keys)
        resident = await self._on_every(ProcessRole.PROCESS_ROLE_DECODE, lambda w: w.decode().DropBlocks(at_decode))
        stored += await self._on_every(prefill_role, lambda w: w.prefill().DeleteBlocks(at_prefill))
        for answer in stored:
            deleted.update(map(bytes, answer.deleted))
            freed += answer.bytes_freed
        for dropped in resident:
            deleted.update(map(bytes, dropped.dropped))
            freed += dropped.bytes_freed
        for worker in self._decode():
            for key in keys:
                worker.resident.pop(key, None)
        return deleted, freed

    async def _selected(self, selector: v1.BlockSelector) -> list[bytes]:
        """Keys of all blocks that a selector selects."""
        wanted = stored_request(selector, self._tenants)
        keys, after = list[bytes](), b""
        while True:
            found, after = await self._page(wanted, MAX_PAGE, after)
            keys.extend(bytes.fromhex(block.block_key) for block in found)
            if not after:
                return keys
            if len(keys) > MAX_SELECTED:
                raise InvalidRequestError(
                    Reason.INVALID_FIELD, "selector", "selects too many blocks at once; narrow it", limit=MAX_SELECTED
                )

    async def _page(
        self, wanted: prefill.DescribeStoredRequest, size: int, after: bytes
    ) -> tuple[list[v1.BlockDescription], bytes]:
        """Blocks after a key, and the key that the next page comes after; empty at the end."""
        ask = prefill.DescribeStoredRequest()
        ask.CopyFrom(wanted)
        ask.page_size, ask.after_key = size, after
        holders, users = self._prefill(), self._decode()
        at_decode = decode.DescribeResidentRequest(keys=wanted.keys, after_key=after, page_size=size)
        stored, resident = await asyncio.gather(
            _all(worker.prefill().DescribeBlocks(ask, timeout=_ASK_SECONDS) for worker in holders),
            _all(worker.decode().DescribeBlocks(at_decode, timeout=_ASK_SECONDS) for worker in users),
        )
        # What a worker has not looked at yet is on a later page, whoever else may know of it.
        ends = [bytes(answer.looked_at) for answer in stored if answer.looked_at]
        ends += [bytes(told.blocks[-1].key) for told in resident if len(told.blocks) == size]
        end = min(ends, default=b"")
        blocks: dict[bytes, v1.BlockDescription] = {}
        for worker, answer in zip(holders, stored, strict=True):
            for block in answer.blocks:
                _add_stored(blocks.setdefault(bytes(block.key), _described(block.key, block.tokens)), block, worker)
        for worker, told in zip(users, resident, strict=True):
            for one in told.blocks:
                key = bytes(one.key)
                if key in blocks or _selects(wanted, one, after):
                    _add_resident(blocks.setdefault(key, _described(key, one.tokens)), one, worker)
        ordered = [key for key in sorted(blocks) if not end or key <= end][:size]
        more = ordered[-1] if len(ordered) == size else end
        return [blocks[key] for key in ordered], more

    def _prefill(self) -> list[Worker]:
        return self._cluster.prefill_workers

    def _decode(self) -> list[Worker]:
        return self._cluster.decode_workers

    async def _on_every(self, role: ProcessRole.ValueType, call: Callable[[Worker], Awaitable[T]]) -> list[T]:
        """Calls every worker of a role, usable or not; one of another kind of KV holds none of these blocks."""
        kind = self._cluster.info.compatibility
        workers = [w for w in self._cluster.workers if w.role == role and (w.info is None or w.serves(kind))]
        answers = await asyncio.gather(*(_within(call(worker)) for worker in workers), return_exceptions=True)
        good: list[T] = []
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, BaseException):
                why = answer.details() if isinstance(answer, grpc.aio.AioRpcError) else str(answer)
                raise DrystoneError(
                    Reason.WORKER_LOST,
                    f"worker {worker.worker_id} did not remove the blocks: {why}; some may be left: delete again",
                    metadata={"worker_id": worker.worker_id},
                    retry_after_ms=1000,
                ) from answer
            good.append(answer)
        return good


async def _within(answer: Awaitable[T]) -> T:
    async with asyncio.timeout(_ASK_SECONDS):
        return await answer


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Every answer; raises DrystoneError when a worker does not give one."""
    try:
        return list(await asyncio.gather(*calls))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, Reason.WORKER_LOST) from error


def _described(key: bytes, tokens: int) -> v1.BlockDescription:
    return v1.BlockDescription(block_key=key.hex(), tokens=tokens)


def _add_stored(block: v1.BlockDescription, stored: prefill.StoredBlock, worker: Worker) -> None:
    _used(block, stored.hits, stored.idle_ms)
    for tier in stored.tiers:
        shared = tier == ShipSource.SHIP_SOURCE_OBJECT_STORE
        place = OBJECT_STORE if shared else worker.worker_id
        if not any(known.place == place and known.source == SOURCES[tier] for known in block.locations):
            block.locations.add(place=place, source=SOURCES[tier], bytes=stored.bytes)
    block.pinned |= stored.pinned
    block.tenant = stored.tenant
    block.recorded |= stored.recorded
    block.tags.extend(tag for tag in stored.tags if tag not in block.tags)
    if stored.HasField("ttl_seconds"):
        block.ttl_seconds = max(block.ttl_seconds, stored.ttl_seconds)


def _add_resident(block: v1.BlockDescription, resident: decode.ResidentBlock, worker: Worker) -> None:
    _used(block, resident.hits, resident.idle_ms)
    block.locations.add(place=worker.worker_id, source=BlockSource.BLOCK_SOURCE_RESIDENT, bytes=resident.bytes)
    block.pinned |= resident.pinned
    if not block.recorded:
        block.tenant = resident.tenant


def _used(block: v1.BlockDescription, hits: int, idle_ms: int) -> None:
    """Both kinds of worker count a request that had the block shipped: the larger count is the better one."""
    block.idle_ms = min(block.idle_ms, idle_ms) if block.locations else idle_ms
    block.hits = max(block.hits, hits)


def _selects(wanted: prefill.DescribeStoredRequest, block: decode.ResidentBlock, after: bytes) -> bool:
    """True for a block that only a decode worker holds, and that is meant all the same. It has no tags."""
    key = bytes(block.key)
    return not wanted.tags and block.tenant == wanted.tenant and key > after and key.hex().startswith(wanted.key_prefix)
