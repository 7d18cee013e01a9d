"""What operators do to resident blocks: look at them, keep them, drop them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from decode_worker.pool import Pool
from shared.internal.v1.decode_pb2 import ResidentBlock

# Share of the pool that operators may hold: requests need the rest to run at all.
MOST_HELD = 0.5


def describe(pool: Pool, keys: Iterable[bytes], after: bytes = b"", most: int = 0) -> list[ResidentBlock]:
    """Resident blocks in the order of their keys. Sealed segments are no blocks.

    Args:
        pool: Where they are.
        keys: Those that are meant; none means all.
        after: Only keys after this one.
        most: Blocks to return; 0 is no bound.
    """
    named, now = set(keys), time.monotonic()
    found = (pool.blocks.find(key) for key in named) if named else pool.blocks.all()
    meant = [block for block in found if block is not None and not block.segment and block.key > after]
    return [
        ResidentBlock(
            key=block.key,
            tokens=block.extent.tokens,
            bytes=pool.arena.shape.extent_bytes(block.extent.tokens),
            users=block.pins,
            hits=block.hits,
            idle_ms=int((now - block.last_used) * 1e3),
            pinned=block.held,
            tenant=block.tenant,
        )
        for block in sorted(meant, key=lambda block: block.key)[: most or None]
    ]


def pin(pool: Pool, keys: Iterable[bytes], *, held: bool) -> list[bytes]:
    """Keeps resident blocks from eviction, or lets them go again; keys that changed.

    At most half of the pool is held: a block beyond that stays as it is.
    """
    changed = []
    most = int(MOST_HELD * pool.arena.capacity_bytes)
    total = sum(pool.arena.shape.extent_bytes(block.extent.tokens) for block in pool.blocks.all() if block.held)
    for key in dict.fromkeys(keys):
        block = pool.blocks.find(key)
        if block is None or block.segment or block.held == held:
            continue
        size = pool.arena.shape.extent_bytes(block.extent.tokens)
        if held and total + size > most:
            continue
        pool.blocks.hold(block, held=held)
        total += size if held else -size
        changed.append(key)
    return changed


def drop(pool: Pool, keys: Iterable[bytes]) -> tuple[list[bytes], int]:
    """Drops blocks, and the kept tails that were read over them; keys that were here, and bytes freed at once.

    A block in use is freed by its last user, and one on its way is not kept after those who wait for it: neither is
    found by a request that comes later.
    """
    named = dict.fromkeys(keys)
    dropped, free = [], pool.arena.free_records
    pool.sealed.drop_over(named)
    for key in named:
        here = pool.blocks.find(key)
        fetch = pool.fetches.get(key)
        if fetch is not None:
            fetch.store = False
            dropped.append(key)
        elif here is not None and not here.segment:
            pool.blocks.drop(key)
            dropped.append(key)
    return dropped, (pool.arena.free_records - free) * pool.arena.shape.record_bytes
