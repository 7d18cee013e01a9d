"""Encoded blocks in memory: a byte budget, least recently used out first.

A stored block's extent is never written again, so it may be shipped by any number of transfers at once
while eviction merely lets go of it: the memory lives until the last transfer has let go too.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

import torch

from shared.kv.birth import Birth


@dataclass(slots=True, eq=False)
class StoredBlock:
    """One encoded block: extent [layers, tokens, 2, kv_heads, head_dim] and the birth that its checksums are of."""

    key: bytes
    token_ids: tuple[int, ...]
    extent: torch.Tensor
    birth: Birth
    pinned: bool = False
    hits: int = 0
    last_used: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes of the extent."""
        return self.extent.numel() * self.extent.element_size()


class RamStore:
    """Blocks by key within a budget of bytes. Used by the event loop alone."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> StoredBlock | None:
        """A block, marked as used now."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
            block.hits += 1
            block.last_used = time.monotonic()
        return block

    def peek(self, key: bytes) -> StoredBlock | None:
        """A block, not marked."""
        return self._blocks.get(key)

    def all(self) -> list[StoredBlock]:
        """Every block."""
        return list(self._blocks.values())

    def put(self, block: StoredBlock) -> None:
        """Keeps a block if the budget allows it at all; others go to make room."""
        if block.bytes > self.budget_bytes or block.key in self._blocks:
            return
        block.last_used = time.monotonic()
        self._blocks[block.key] = block
        self.used_bytes += block.bytes
        while self.used_bytes > self.budget_bytes:
            victim = next((old for old in self._blocks.values() if not old.pinned and old is not block), block)
            self.delete(victim.key)

    def delete(self, key: bytes) -> int:
        """Lets go of a block; bytes freed."""
        block = self._blocks.pop(key, None)
        if block is None:
            return 0
        self.used_bytes -= block.bytes
        return block.bytes
