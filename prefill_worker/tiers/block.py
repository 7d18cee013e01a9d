"""One encoded block, as tiers keep it and links ship it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared.kv.birth import Birth


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlock:
    """One encoded block. Never written again, so that any number of transfers may read it at once.

    Attributes:
        key: 32 bytes (shared/kv/keys.py).
        token_ids: Its tokens.
        data: The extent's bytes, [layers, tokens, 2, kv_heads, head_dim] in the model's dtype. The view owns what is
            behind it: the tensor that the forward filled, or the buffer that a file was read into. It is what is sent.
        birth: The encoding that its checksums are of.
        tenant: Whose it is; empty for the tenant without a name.
    """

    key: bytes
    token_ids: tuple[int, ...]
    data: memoryview
    birth: Birth
    tenant: str = ""

    # What is shipped (prefill_worker/transfer/source.py): whole from the beginning.

    @property
    def tokens(self) -> int:
        """Tokens of the block."""
        return self.birth.tokens

    @property
    def birth_id(self) -> bytes:
        """16 bytes."""
        return self.birth.birth_id

    @property
    def failure(self) -> None:
        """Nothing is missing."""
        return

    def checksum(self, index: int) -> int:
        """Of chunk `index`."""
        return self.birth.checksums[index]

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Nothing will change."""
        del wake
        return _nothing

    @property
    def bytes(self) -> int:
        """Bytes of the extent."""
        return self.data.nbytes


def _nothing() -> None:
    """Ends a subscription that never was."""
