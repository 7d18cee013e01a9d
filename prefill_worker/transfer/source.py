"""What can be shipped: a block that is whole, or one whose later layers are still being encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Source(Protocol):
    """An extent and its checksums. Bytes of a chunk that has a checksum are final."""

    @property
    def key(self) -> bytes:
        """32 bytes."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of the block."""
        ...

    @property
    def birth_id(self) -> bytes:
        """16 bytes: the encoding that the checksums are of."""
        ...

    @property
    def data(self) -> memoryview:
        """The whole extent's bytes, [layers, tokens, 2, kv_heads, head_dim] in the model's dtype."""
        ...

    @property
    def failure(self) -> str | None:
        """Why what is missing will never come; None while it may."""
        ...

    def checksum(self, index: int) -> int | None:
        """Checksum of chunk `index` of the chunk plan; None while the chunk is not made. From any thread."""
        ...

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Has `wake` called, on any thread, after each change; returns what ends that."""
        ...
