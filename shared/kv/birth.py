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
CHUNK_BYTES = 2 << 20


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


class GrowingBirth:
    """A birth whose extent is still being written: its id is drawn first, its chunks are summed as layers end.

    One thread sums; any thread may ask for a checksum. A chunk is in order behind all before it, so the checksums that
    there are, are those of the first chunks.

    Args:
        key: 32 bytes.
        shape: Of one token's KV.
        tokens: Tokens of the block.
        data: The whole extent's bytes.

    Attributes:
        birth_id: 16 bytes, drawn here.
        chunks: What the extent travels in.
    """

    def __init__(self, key: bytes, shape: KvShape, tokens: int, data: memoryview) -> None:
        self.birth_id = secrets.token_bytes(BIRTH_ID_BYTES)
        self.chunks = chunk_plan(shape, tokens)
        self._key = key
        self._shape = shape
        self._tokens = tokens
        self._data = data
        # Only ever appended to: what another thread reads of it stays true.
        self._sums: list[int] = []

    def checksum(self, index: int) -> int | None:
        """Of chunk `index`; None while it is not summed."""
        return self._sums[index] if index < len(self._sums) else None

    def sum_layers(self, count: int) -> Iterator[int]:
        """Sums the chunks within layers [0, count), whose bytes are final; yields the index of each after it."""
        for chunk in self.chunks[len(self._sums) :]:
            if chunk.first_layer + chunk.layer_count > count:
                return
            part = self._data[chunk.offset : chunk.offset + chunk.length]
            self._sums.append(chunk_checksum(self._key, self.birth_id, self._shape, self._tokens, chunk, part))
            yield chunk.index

    def birth(self) -> Birth:
        """The birth, once every chunk is summed.

        Raises:
            ValueError: Some are not.
        """
        if len(self._sums) < len(self.chunks):
            raise ValueError(f"{len(self._sums)} of {len(self.chunks)} chunks are summed")
        return Birth(self.birth_id, self._tokens, tuple(self._sums))


def make_birth(key: bytes, shape: KvShape, tokens: int, data: memoryview) -> Birth:
    """Names a fresh encoding of `tokens` tokens whose extent bytes are `data` and sums its chunks."""
    growing = GrowingBirth(key, shape, tokens, data)
    for _ in growing.sum_layers(shape.layers):
        pass
    return growing.birth()


def chunk_stops(shape: KvShape, tokens: int) -> tuple[int, ...]:
    """Counts of layers at which chunks end, rising; the last is all layers."""
    return tuple(sorted({chunk.first_layer + chunk.layer_count for chunk in chunk_plan(shape, tokens)}))
