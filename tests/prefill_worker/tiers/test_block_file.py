"""One block as a file: read by safetensors, refused whenever one bit or byte of it is not what was written."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from prefill_worker.tiers import block_file
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import (
    TENANT_BYTES_MAX,
    BadBlockFileError,
    FileIdentity,
    decode_file,
    decode_head,
    encode_file,
    file_bytes,
    head_bytes,
    tokens_of,
)
from shared.kv.birth import Birth, chunk_plan, make_birth
from shared.kv.keys import KeySpace
from shared.kv.layout import KvShape
from shared.transfer.raw import raw_bytes
from tests.support.tier_parts import SHAPE, key_of, tiny_block

KEYS = KeySpace(bytes(range(32)), SHAPE.dtype, 1, bytes(32), b"salt")
IDENTITY = FileIdentity.of(KEYS, SHAPE)
BLOCK = tiny_block(1, tokens=3, tenant="Grüße \x01\U0001f600")
FILE = b"".join(encode_file(BLOCK, IDENTITY))
HEAD = head_bytes(3, IDENTITY)


def decoded(data: bytes, key: bytes = BLOCK.key, identity: FileIdentity = IDENTITY) -> StoredBlock:
    return decode_file(memoryview(data), key, identity)


def same(one: StoredBlock, other: StoredBlock) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("key", "token_ids", "data", "birth", "tenant"))


def with_header(header: dict[str, object] | bytes, rest: bytes = FILE[HEAD - 12 :]) -> bytes:
    """A file whose header is another, of the length that it should have."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    length = HEAD - 12 - 8
    return struct.pack("<Q", length) + text.ljust(length) + rest


def header() -> dict[str, dict[str, object]]:
    parsed: dict[str, dict[str, object]] = json.loads(FILE[8 : HEAD - 12])
    return parsed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_reads_it(dtype: str, tmp_path: Path) -> None:
    shape, tokens = KvShape(3, 2, 8, dtype), 5
    kv = torch.randn(3, tokens, 2, 2, 8).to(getattr(torch, dtype))
    data = raw_bytes(kv)
    ids = (0, 7, 151_935, 3, 3)
    block = StoredBlock(key_of(9), ids, data, make_birth(key_of(9), shape, tokens, data), "acme")
    identity = replace(IDENTITY, shape=shape)
    path = tmp_path / "block.safetensors"
    path.write_bytes(b"".join(encode_file(block, identity)))
    assert path.stat().st_size == file_bytes(tokens, identity)
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == {"kv", "token_ids"}
    assert torch.equal(loaded["kv"], kv)
    assert tuple(loaded["token_ids"].tolist()) == ids
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        assert torch.equal(opened.get_tensor("kv"), kv)
    assert (metadata["tenant"], metadata["key"], metadata["dtype"]) == ("acme", key_of(9).hex(), dtype)
    assert same(decode_file(memoryview(path.read_bytes()), block.key, identity), block)


def test_kv_is_copied_neither_in_nor_out() -> None:
    assert encode_file(BLOCK, IDENTITY)[-1] is BLOCK.data
    whole = memoryview(bytearray(FILE))
    read = decode_file(whole, BLOCK.key, IDENTITY)
    assert same(read, BLOCK)
    whole[-1] ^= 1
    assert read.data[-1] == BLOCK.data[-1] ^ 1


def test_every_flipped_bit_is_found() -> None:
    whole = bytearray(FILE)
    for bit in range(8 * len(FILE)):
        whole[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadBlockFileError):
            decode_file(memoryview(whole), BLOCK.key, IDENTITY)
        whole[bit // 8] ^= 1 << bit % 8
    assert same(decoded(bytes(whole)), BLOCK)


@given(st.integers(0, len(FILE) - 1))
def test_every_truncation_is_found(length: int) -> None:
    with pytest.raises(BadBlockFileError):
        decoded(FILE[:length])


@given(st.binary(min_size=1, max_size=64))
def test_nothing_may_follow(more: bytes) -> None:
    with pytest.raises(BadBlockFileError):
        decoded(FILE + more)


@given(st.binary(max_size=4096))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadBlockFileError):
        decoded(data)


@given(st.binary(max_size=HEAD - 20))
def test_any_header_is_refused(text: bytes) -> None:
    with pytest.raises(BadBlockFileError):
        decoded(with_header(text))


@given(st.data())
def test_a_piece_of_another_file_of_the_same_block_is_refused(data: st.DataObject) -> None:
    """Equal key, another birth: what mixes the two is neither."""
    other = b"".join(encode_file(tiny_block(1, tokens=3, tenant=BLOCK.tenant), IDENTITY))
    cut = data.draw(st.integers(1, HEAD - 1))
    mixed = FILE[:cut] + other[cut:]
    if mixed in (FILE, other):
        return
    with pytest.raises(BadBlockFileError):
        decoded(mixed)


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        (replace(IDENTITY, model_fingerprint=bytes(32)), "model_fingerprint"),
        (replace(IDENTITY, rope_regime=b"\1" * 32), "rope_regime"),
        (replace(IDENTITY, layout_version=2), "layout_version"),
        (replace(IDENTITY, shape=replace(SHAPE, dtype="float16", head_dim=4)), "dtype"),
        (replace(IDENTITY, shape=replace(SHAPE, kv_heads=2, head_dim=1)), "shape"),
        (replace(IDENTITY, shape=replace(SHAPE, layers=1, head_dim=4)), "shape"),
        (replace(IDENTITY, shape=replace(SHAPE, layers=3)), "number of tokens"),
    ],
)
def test_a_block_of_another_model_or_layout_is_refused_by_name(identity: FileIdentity, named: str) -> None:
    with pytest.raises(BadBlockFileError, match=named):
        decoded(FILE, identity=identity)


def test_a_block_under_another_key_is_refused() -> None:
    with pytest.raises(BadBlockFileError, match="key is"):
        decoded(FILE, key=key_of(2))


def test_a_header_with_other_tensors_is_refused() -> None:
    right = header()
    kv, ids = right["kv"], right["token_ids"]
    for wrong in (
        {**right, "more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
        {"__metadata__": right["__metadata__"], "kv": kv},
        {**right, "kv": {**kv, "data_offsets": [0, 96]}},
        {**right, "kv": {**kv, "shape": [2, 3, 2, 2, 1]}},
        {**right, "token_ids": {**ids, "dtype": "F32"}},
        {**right, "__metadata__": {**right["__metadata__"], "more": ""}},
        {**right, "__metadata__": {**right["__metadata__"], "tenant": "another"}},
        {**right, "__metadata__": {**right["__metadata__"], "tenant": "\ud800"}},
        {**right, "__metadata__": {**right["__metadata__"], "tenant": 7}},
        {**right, "__metadata__": {**right["__metadata__"], "chunk_checksums": "0" * 32}},
        {**right, "__metadata__": {**right["__metadata__"], "birth_id": "00"}},
        {**right, "__metadata__": []},
    ):
        with pytest.raises(BadBlockFileError):
            decoded(with_header(wrong))
    assert same(decoded(with_header(dict(right))), BLOCK)


def test_json_that_would_hurt_is_refused() -> None:
    text = FILE[8 : HEAD - 12].rstrip()
    for wrong in (
        b"[" * (HEAD - 20),
        text.replace(b'"kv":', b'"kv":{},"kv":'),
        text.replace(b'"tenant":', b'"tenant":"","tenant":'),
        b'{"__metadata__":' + b"9" * 3000 + b"}",
        b'{"__metadata__":NaN}',
        b" " + text,
    ):
        with pytest.raises(BadBlockFileError):
            decoded(with_header(wrong))


def test_token_ids_of_another_block_are_refused() -> None:
    with pytest.raises(BadBlockFileError, match="token ids"):
        decoded(FILE[: HEAD - 4] + struct.pack("<i", 99) + FILE[HEAD:])


def test_the_head_alone_tells_tokens_and_tenant() -> None:
    head = decode_head(memoryview(FILE)[:HEAD], len(FILE), BLOCK.key, IDENTITY)
    assert (head.token_ids, head.tenant, head.birth) == (BLOCK.token_ids, BLOCK.tenant, BLOCK.birth)
    with pytest.raises(BadBlockFileError, match="of a head of"):
        decode_head(memoryview(FILE)[: HEAD - 1], len(FILE), BLOCK.key, IDENTITY)
    with pytest.raises(BadBlockFileError, match="number of tokens"):
        decode_head(memoryview(FILE), len(FILE) + 1, BLOCK.key, IDENTITY)


def test_what_is_not_one_block_is_not_written() -> None:
    for wrong in (
        replace(BLOCK, token_ids=(1, 2)),
        replace(BLOCK, token_ids=()),
        replace(BLOCK, data=BLOCK.data[1:]),
        replace(BLOCK, birth=Birth(BLOCK.birth.birth_id, 3, (1, 2))),
        replace(BLOCK, tenant="é" * (TENANT_BYTES_MAX // 2 + 1)),
        replace(BLOCK, token_ids=(0, 1, 1 << 31)),
    ):
        with pytest.raises(ValueError, match=r"."):
            encode_file(wrong, IDENTITY)


@pytest.mark.parametrize("letter", ["\x01", "é", "€", "\U0001f600", '"'])
def test_the_longest_tenant_fits(letter: str) -> None:
    tenant = letter * (TENANT_BYTES_MAX // len(letter.encode()))
    block = tiny_block(1, tenant=tenant)
    data = b"".join(encode_file(block, IDENTITY))
    assert len(data) == file_bytes(len(block.token_ids), IDENTITY)
    assert same(decoded(data), block)


@given(
    st.builds(
        KvShape,
        st.integers(1, 40),
        st.integers(1, 8),
        st.sampled_from([2, 64, 128]),
        st.sampled_from(["float32", "float16"]),
    ),
    st.integers(1, 5000),
)
@hypothesis_settings(deadline=None)
def test_sizes_and_tokens_are_one_to_one(shape: KvShape, tokens: int) -> None:
    identity = replace(IDENTITY, shape=shape)
    size = file_bytes(tokens, identity)
    assert block_file.chunk_count(shape, tokens) == len(chunk_plan(shape, tokens))
    assert tokens_of(size, identity) == tokens
    assert tokens_of(size - 1, identity) is None
    assert head_bytes(tokens, identity) + shape.extent_bytes(tokens) == size


def test_chunks_beyond_the_first_are_verified() -> None:
    """A block of more than one chunk, one bit flipped in each."""
    shape = KvShape(layers=3, kv_heads=4, head_dim=64, dtype="float32")
    block = tiny_block(5, tokens=600, shape=shape)
    identity = replace(IDENTITY, shape=shape)
    whole = bytearray(b"".join(encode_file(block, identity)))
    assert len(block.birth.checksums) > 2
    for chunk in chunk_plan(shape, 300):
        at = head_bytes(300, identity) + chunk.offset + chunk.length // 2
        whole[at] ^= 4
        with pytest.raises(BadBlockFileError, match=f"chunk {chunk.index}"):
            decode_file(memoryview(whole), block.key, identity)
        whole[at] ^= 4
    assert same(decode_file(memoryview(whole), block.key, identity), block)
