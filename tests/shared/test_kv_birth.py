"""Chunks tile an extent exactly, and no chunk verifies as another."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from shared.kv.birth import BIRTH_ID_BYTES, CHUNK_BYTES, ChunkRange, chunk_checksum, chunk_plan, make_birth
from shared.kv.layout import ITEM_BYTES, KvShape

SHAPES = st.builds(
    KvShape,
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
)
SHAPE = KvShape(3, 2, 8, "float32")


@settings(max_examples=300)
@given(shape=SHAPES, tokens=st.integers(1, 300), chunk_bytes=st.integers(0, 60_000))
def test_chunks_tile_the_extent(shape: KvShape, tokens: int, chunk_bytes: int) -> None:
    plan = chunk_plan(shape, tokens, chunk_bytes)
    position = 0
    layer_bytes = tokens * shape.record_bytes
    for index, chunk in enumerate(plan):
        assert chunk.index == index
        assert chunk.offset == position
        assert chunk.length > 0
        assert chunk.length % shape.record_bytes == 0
        # At most the limit, unless not even one record fits.
        assert chunk.length <= max(chunk_bytes, shape.record_bytes)
        assert chunk.first_layer == chunk.offset // layer_bytes
        last = (chunk.offset + chunk.length - 1) // layer_bytes
        assert chunk.layer_count == last - chunk.first_layer + 1
        assert chunk.layer_count == 1 or chunk.offset % layer_bytes == chunk.length % layer_bytes == 0
        position += chunk.length
    assert position == shape.extent_bytes(tokens)


def test_small_layers_travel_together_and_large_ones_in_parts() -> None:
    assert chunk_plan(SHAPE, 10, 1 << 20) == (ChunkRange(0, 0, 3, 0, SHAPE.extent_bytes(10)),)
    record = SHAPE.record_bytes
    assert [(c.first_layer, c.length // record) for c in chunk_plan(SHAPE, 10, 4 * record)] == [
        *[(0, 4), (0, 4), (0, 2)],
        *[(1, 4), (1, 4), (1, 2)],
        *[(2, 4), (2, 4), (2, 2)],
    ]
    large = KvShape(2, 8, 128, "bfloat16")
    assert all(chunk.length <= CHUNK_BYTES for chunk in chunk_plan(large, 4096))


def data_of(shape: KvShape, tokens: int) -> memoryview:
    return memoryview(bytes(index * 7 % 251 for index in range(shape.extent_bytes(tokens))))


def test_a_birth_sums_every_chunk_and_is_new_each_time() -> None:
    shape = KvShape(4, 4, 64, "float32")
    tokens, key = 900, b"k" * 32
    data = data_of(shape, tokens)
    birth = make_birth(key, shape, tokens, data)
    plan = chunk_plan(shape, tokens)
    assert len(birth.birth_id) == BIRTH_ID_BYTES
    assert len(birth.checksums) == len(plan) > 1
    for chunk, checksum in zip(plan, birth.checksums, strict=True):
        part = data[chunk.offset : chunk.offset + chunk.length]
        assert chunk_checksum(key, birth.birth_id, shape, tokens, chunk, part) == checksum
    again = make_birth(key, shape, tokens, data)
    assert again.birth_id != birth.birth_id
    assert not set(again.checksums) & set(birth.checksums)


CHUNK = ChunkRange(0, 0, 3, 0, SHAPE.extent_bytes(4))
GOOD = (b"k" * 32, b"b" * 16, SHAPE, 4, CHUNK)


@pytest.mark.parametrize(
    "other",
    [
        (b"l" * 32, *GOOD[1:]),
        (GOOD[0], b"c" * 16, *GOOD[2:]),
        (*GOOD[:2], replace(SHAPE, layers=4), 4, CHUNK),
        (*GOOD[:2], replace(SHAPE, kv_heads=4, head_dim=4), 4, CHUNK),
        (*GOOD[:2], replace(SHAPE, dtype="bfloat16"), 4, CHUNK),
        (*GOOD[:3], 5, CHUNK),
        (*GOOD[:4], replace(CHUNK, index=1)),
        (*GOOD[:4], replace(CHUNK, first_layer=1)),
        (*GOOD[:4], replace(CHUNK, offset=64)),
        (*GOOD[:4], replace(CHUNK, length=64)),
    ],
    ids=["key", "birth", "layers", "heads", "dtype", "tokens", "index", "layer", "offset", "length"],
)
def test_the_checksum_covers_who_a_chunk_is(other: tuple[bytes, bytes, KvShape, int, ChunkRange]) -> None:
    data = data_of(SHAPE, 4)
    assert chunk_checksum(*other, data) != chunk_checksum(*GOOD, data)


@given(st.integers(0, SHAPE.extent_bytes(4) * 8 - 1))
def test_any_bit_counts(bit: int) -> None:
    data = bytearray(data_of(SHAPE, 4))
    before = chunk_checksum(*GOOD, memoryview(data))
    data[bit // 8] ^= 1 << bit % 8
    assert chunk_checksum(*GOOD, memoryview(data)) != before


def test_the_golden_checksum() -> None:
    # Workers of different releases must agree while their protocol version is the same.
    assert chunk_checksum(*GOOD, data_of(SHAPE, 4)) == 0xA6802B291C6B086C
