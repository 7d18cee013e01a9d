"""Names of tails: what stands before them, and each segment of them, chained (decode_worker/sealed.py).

A segment's KV depends on every block before it, in order, and on every token of the tail up to it. So its key is
its parent's key and its own tokens; the root stands for the blocks.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

SEGMENT_TOKENS = 64


def root_key(salt: bytes, block_keys: Iterable[bytes]) -> bytes:
    """32 bytes that stand for everything before a tail: the tenant's salt, and the blocks in order."""
    digest = hashlib.blake2b(digest_size=32, person=b"drystone-tail")
    digest.update(struct.pack("<I", len(salt)) + salt)
    for key in block_keys:
        digest.update(key)
    return digest.digest()


def segment_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """32 bytes that stand for a segment: everything before it, and its own tokens."""
    return hashlib.blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=32).digest()


def chain(root: bytes, tokens: Sequence[int]) -> list[bytes]:
    """Keys of the whole segments of a tail that begins with `tokens`."""
    keys: list[bytes] = []
    for start in range(0, len(tokens) - SEGMENT_TOKENS + 1, SEGMENT_TOKENS):
        keys.append(segment_key(keys[-1] if keys else root, tokens[start : start + SEGMENT_TOKENS]))
    return keys
