"""One encoding of a block: its birth id, the chunks it travels in, and their checksums.

Checksums are made once, where the block is born, and cover bytes **and** identity, so that a chunk
of another block, birth, shape or range never verifies (design §4). The chunk plan depends on the
shape alone: sender and receiver compute the same one and nothing about it is taken on trust.
"""

from __future__ import annotations

import functools
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from shared.kv.layout import LAYOUT_VERSION, KvShape

BIRTH_ID_BYTES = 16
CHECKSUM_FUNCTION = "xxh3-64"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """A run of an extent's bytes: whole layers, or a part of one layer where a layer is too large."""

    index: int
    first_layer: int
    layer_count: int
    offset: int
    length: int


@functools.lru_cache(maxsize=256)
def chunk_plan(shape: KvShape, tokens: int, chunk_bytes: int = CHUNK_BYTES) -> tuple[ChunkRange, ...]:
    """Cuts an extent of `tokens` tokens into chunks of at most `chunk_bytes` bytes (at least one record each).

    A function of its arguments alone, looked up for every chunk that is sent or taken: kept.
    """
    return tuple(ChunkRange(index, *piece) for index, piece in enumerate(_pieces(shape, tokens, max(chunk_bytes, 1))))


def _pieces(shape: KvShape, tokens: int, chunk_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    layer_bytes = tokens * shape.record_bytes
    if layer_bytes <= chunk_bytes:
        group = max(1, chunk_bytes // layer_bytes)
        for first in range(0, shape.layers, group):
            count = min(group, shape.layers - first)
            yield first, count, first * layer_bytes, count * layer_bytes
        return
    part = max(1, chunk_bytes // shape.record_bytes) * shape.record_bytes
    for layer in range(shape.layers):
        for start in range(0, layer_bytes, part):
            yield layer, 1, layer * layer_bytes + start, min(part, layer_bytes - start)


def chunk_identity(key: bytes, birth_id: bytes, shape: KvShape, tokens: int, chunk: ChunkRange) -> bytes:
    """What a chunk's checksum covers before its bytes: which bytes of which encoding they are."""
    return struct.pack(
        "<32s16sIIIIIIIQQ8s",
        key,
        birth_id,
        LAYOUT_VERSION,
        shape.layers,
        tokens,
        shape.kv_heads,
        shape.head_dim,
        chunk.index,
        chunk.first_layer,
        chunk.offset,
        chunk.length,
        shape.dtype.encode(),
    )


def chunk_checksum(
    key: bytes, birth_id: bytes, shape: KvShape, tokens: int, chunk: ChunkRange, data: memoryview
) -> int:
    """xxh3-64 over the identity of a chunk and its bytes; unsigned."""
    digest = xxhash.xxh3_64(chunk_identity(key, birth_id, shape, tokens, chunk))
    digest.update(data)
    return digest.intdigest()


@dataclass(frozen=True, slots=True)
class Birth:
    """Identity of one encoding; checksums are indexed by chunk."""

    birth_id: bytes
    tokens: int
    checksums: tuple[int, ...]


def make_birth(key: bytes, shape: KvShape, tokens: int, data: memoryview) -> Birth:
    """Names a fresh encoding of `tokens` tokens whose extent bytes are `data` and sums its chunks."""
    birth_id = secrets.token_bytes(BIRTH_ID_BYTES)
    sums = tuple(
        chunk_checksum(key, birth_id, shape, tokens, chunk, data[chunk.offset : chunk.offset + chunk.length])
        for chunk in chunk_plan(shape, tokens)
    )
    return Birth(birth_id, tokens, sums)
