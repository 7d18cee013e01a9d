"""A block while its forward runs: what is final of it is shipped, what is not has no checksum yet.

layers       0 .. a-1     a .. b-1     b .. n-1
          ┌────────────┬────────────┬────────────┐
extent    │   final    │   final    │  written   │   one writer: the encoder's thread
          └────────────┴────────────┴────────────┘
checksums │  chunk 0   │  chunk 1   │     -      │   any thread reads them, and what they cover
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from prefill_worker.tiers.block import StoredBlock
from shared import logs
from shared.kv.birth import GrowingBirth, chunk_stops
from shared.kv.layout import KvShape


class Newborn:
    """An extent that a forward fills. The encoder's thread writes; any thread may read what has a checksum.

    It ends whole or failed, always: whoever ships it waits for one of the two. What has a checksum stays as it is even
    when the rest fails, so that no byte changes under a message that carries it.

    Args:
        key: 32 bytes.
        token_ids: Its tokens.
        tenant: Whose it is; empty for the tenant without a name.
        shape: Of one token's KV.
        data: The extent's bytes, which the forward writes, [layers, tokens, 2, kv_heads, head_dim].
    """

    def __init__(self, key: bytes, token_ids: tuple[int, ...], tenant: str, shape: KvShape, data: memoryview) -> None:
        self.key = key
        self.data = data
        self.tokens = len(token_ids)
        self._token_ids = token_ids
        self._tenant = tenant
        self._birth = GrowingBirth(key, shape, self.tokens, data)
        self._stops = chunk_stops(shape, self.tokens)
        self._failure: str | None = None
        self._lock = threading.Lock()
        # Guarded by the lock; a subscription is its own identity.
        self._wakes: dict[object, Callable[[], None]] = {}
        self._log = logs.get("newborn")

    @property
    def birth_id(self) -> bytes:
        """16 bytes."""
        return self._birth.birth_id

    @property
    def bytes(self) -> int:
        """Bytes of the extent."""
        return self.data.nbytes

    @property
    def failure(self) -> str | None:
        """Why what is missing will never come; None while it may."""
        return self._failure

    def checksum(self, index: int) -> int | None:
        """Of chunk `index`; None while it is not made."""
        return self._birth.checksum(index)

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Has `wake` called after each change, on the encoder's thread; returns what ends that.

        It is called at once too: nothing that happened before is missed.
        """
        name = object()
        with self._lock:
            self._wakes[name] = wake
        wake()

        def end() -> None:
            with self._lock:
                self._wakes.pop(name, None)

        return end

    # For the encoder's thread alone.

    @property
    def stops(self) -> Sequence[int]:
        """Counts of layers that complete a chunk, rising; the last is all layers."""
        return self._stops

    def layers_done(self, count: int) -> None:
        """Layers [0, count) of all tokens are final and finite: sums what chunks that completes."""
        if self._failure is not None:
            raise ValueError(f"the block failed: {self._failure}")
        for _ in self._birth.sum_layers(count):
            self._wake()

    def fail(self, reason: str) -> None:
        """The rest will never come. Without effect on one that is whole, or has failed."""
        if self._failure is None and not self._whole:
            self._failure = reason
            self._wake()

    def whole(self) -> StoredBlock:
        """The block, of the same birth and the same bytes.

        Raises:
            ValueError: It is not all there.
        """
        return StoredBlock(self.key, self._token_ids, self.data, self._birth.birth(), self._tenant)

    @property
    def _whole(self) -> bool:
        return self._birth.checksum(len(self._birth.chunks) - 1) is not None

    def _wake(self) -> None:
        with self._lock:
            wakes = list(self._wakes.values())
        for wake in wakes:
            try:
                wake()
            except Exception as error:  # noqa: BLE001 - who looks on must not end the forward; it has its own deadline
                self._log.error("wake_failed", key=self.key.hex(), exc_info=error)
