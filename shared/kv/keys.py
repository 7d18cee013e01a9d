"""Names of blocks: equal key means equal values up to rounding (design §4)."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Everything but the tokens that a block's KV depends on, and who may share it.

    Attributes:
        model_fingerprint: 32-byte digest of weights and config.
        dtype: Type of the KV elements.
        layout_version: Version of the extent layout.
        rope_regime: 32-byte digest of every layer's rotation and window.
        tenant_salt: Keeps tenants' blocks apart; empty where they share.
    """

    model_fingerprint: bytes
    dtype: str
    layout_version: int
    rope_regime: bytes
    tenant_salt: bytes = b""

    def key(self, token_ids: Sequence[int]) -> bytes:
        """256-bit key (BLAKE2b, RFC 7693) of a block of these tokens; it has no parent, order does not matter."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"drystone-block")
        tokens = array("I", token_ids)
        fields = (
            self.model_fingerprint,
            self.dtype.encode(),
            struct.pack("<I", self.layout_version),
            self.rope_regime,
            self.tenant_salt,
            tokens.tobytes(),
        )
        for field in fields:
            digest.update(struct.pack("<Q", len(field)))
            digest.update(field)
        return digest.digest()
