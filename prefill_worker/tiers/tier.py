"""One place that keeps blocks. Tiers are composed (block_store.py), never branched on."""

from __future__ import annotations

from typing import Protocol

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import BlockHead
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.meter import TierMeter
from shared.internal.v1.common_pb2 import ShipSource


class Tier(Protocol):
    """Keeps blocks by key within a budget of bytes. All state belongs to one event loop.

    I/O that fails is counted and logged by the tier and costs a miss, never an error of the request: every block can
    be encoded again. Only `delete` raises, since its caller promises that the block is gone.

    Attributes:
        name: "ram", "disk" or "object": label of its metrics.
        source: What a block read from it is said to come from.
        ledger: What it holds, as far as it knows.
        meter: What it has counted.
    """

    name: str
    source: ShipSource.ValueType
    ledger: Ledger
    meter: TierMeter

    async def open(self) -> None:
        """Learns what is there. Called once, before all else."""
        ...

    async def close(self) -> None:
        """Lets go of everything. Called once, after all else."""
        ...

    async def holds(self, key: bytes) -> bool:
        """Whether a read would find the block, without reading its KV or counting a hit."""
        ...

    def pays(self, tokens: int) -> bool:
        """Whether reading a block of so many tokens beats encoding it, as measured; else the tier is off for it."""
        ...

    async def read(self, key: bytes) -> StoredBlock | None:
        """A block, verified; None when it is not there, was bad, or could not be read in time."""
        ...

    async def head(self, key: bytes) -> BlockHead | None:
        """A block's tokens and tenant, verified, without its KV; no hit is counted. None: it is not there, or was bad.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE: it may be there, and the tier could not look.
        """
        ...

    async def write(self, block: StoredBlock, *, pinned: bool) -> bool:
        """Keeps a block; True when the tier holds it now."""
        ...

    async def delete(self, key: bytes) -> int:
        """Removes a block and returns the bytes freed.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE; it may still be there.
        """
        ...

    async def sweep(self) -> None:
        """Expiry, leftovers, what others wrote. Called every so often."""
        ...
