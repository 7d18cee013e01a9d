"""One block as a file that any safetensors library reads, written by hand so that KV is never copied.

    ┌ 8 ───────┬ header_bytes(n) ─────────────────┬ 4·n ───────────┬ extent_bytes(n) ─────────────────┐
    │ length   │ JSON, padded with spaces         │ token_ids I32  │ kv [layers, n, 2, kv_heads, dim] │
    └ LE u64 ──┴──────────────────────────────────┴────────────────┴──────────────────────────────────┘
      ◄─────────────── head_bytes(n) ────────────────────────────►

The size of the header follows from the number of tokens, so that a file's size says how many tokens it holds.
There is one way only to write a block of one birth: a reader makes the header that it should have found and
compares. So nothing in a header is taken on trust, and no flipped bit of it passes. Token ids are covered by the
record checksum, KV by the birth's own checksums, made where the block was born.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from prefill_worker.tiers.block import StoredBlock
from shared.kv.birth import BIRTH_ID_BYTES, CHECKSUM_FUNCTION, CHUNK_BYTES, Birth, chunk_checksum, chunk_plan
from shared.kv.keys import KeySpace
from shared.kv.layout import KvShape

FORMAT = "drystone-block-1"
TENANT_BYTES_MAX = 256
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LENGTH = struct.Struct("<Q")
_ID_BYTES = 4
_SUM_DIGITS = 16
# Room for every field but the chunks' checksums; a tenant of 256 bytes takes at most 1,536 of it, escaped.
_FIELDS_BYTES = 3072


class BadBlockFileError(Exception):
    """The bytes are not the block that they are said to be; `reason` is one sentence for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What every block file of one model has in common."""

    model_fingerprint: bytes
    rope_regime: bytes
    layout_version: int
    shape: KvShape

    @classmethod
    def of(cls, keys: KeySpace, shape: KvShape) -> FileIdentity:
        """Identity of the files of blocks whose keys are of `keys`."""
        return cls(keys.model_fingerprint, keys.rope_regime, keys.layout_version, shape)


@dataclass(frozen=True, slots=True)
class BlockHead:
    """What the head of a file says, verified: everything but the KV."""

    key: bytes
    token_ids: tuple[int, ...]
    tenant: str
    birth: Birth


def head_bytes(tokens: int, identity: FileIdentity) -> int:
    """Bytes before the KV of a block of `tokens` (one or more) tokens."""
    return _LENGTH.size + _header_bytes(tokens, identity) + _ID_BYTES * tokens


def file_bytes(tokens: int, identity: FileIdentity) -> int:
    """Bytes of the file of a block of `tokens` (one or more) tokens."""
    return head_bytes(tokens, identity) + identity.shape.extent_bytes(tokens)


def tokens_of(size: int, identity: FileIdentity) -> int | None:
    """Tokens of a block whose file has `size` bytes; None when no block has."""
    low, high = 1, max(1, size // identity.shape.token_bytes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if file_bytes(middle, identity) < size else (low, middle)
    return low if file_bytes(low, identity) == size else None


def encode_file(block: StoredBlock, identity: FileIdentity) -> list[bytes | memoryview]:
    """The file's bytes in pieces; the last is the block's own data, not a copy.

    Raises:
        ValueError: Data, tokens and checksums are not of one block of this identity, or the tenant's name is longer
            than 256 bytes of UTF-8: a defect of the caller.
    """
    tokens = len(block.token_ids)
    if not tokens or tokens != block.birth.tokens or len(block.birth.checksums) != chunk_count(identity.shape, tokens):
        raise ValueError(f"{tokens} tokens, and a birth of {block.birth.tokens}")
    if block.data.nbytes != identity.shape.extent_bytes(tokens):
        raise ValueError(f"{block.data.nbytes} bytes for {tokens} tokens of {identity.shape}")
    if len(block.tenant.encode()) > TENANT_BYTES_MAX:
        raise ValueError(f"a tenant's name of {len(block.tenant.encode())} bytes; limit {TENANT_BYTES_MAX}")
    try:
        ids = struct.pack(f"<{tokens}i", *block.token_ids)
    except struct.error as error:
        raise ValueError(f"token ids: {error}") from error
    return [_header(block.key, ids, block.tenant, block.birth, identity), ids, block.data]


def decode_head(data: memoryview, size: int, key: bytes, identity: FileIdentity) -> BlockHead:
    """Reads the head of a file.

    Args:
        data: At least the first `head_bytes` of it.
        size: Bytes of the whole file.
        key: The block that it should be.
        identity: The model that it should be of.

    Raises:
        BadBlockFileError: It is not that block.
    """
    tokens = tokens_of(size, identity)
    if tokens is None:
        raise BadBlockFileError(f"{size} bytes are of no number of tokens: cut off, or of another model")
    end = head_bytes(tokens, identity)
    start = end - _ID_BYTES * tokens
    if data.nbytes < end:
        raise BadBlockFileError(f"{data.nbytes} bytes of a head of {end}")
    header, ids = bytes(data[:start]), bytes(data[start:end])
    tenant, birth = _claims(header, tokens, key, identity)
    try:
        right = header == _header(key, ids, tenant, birth, identity)
    except ValueError as error:  # a tenant's name that is not UTF-8
        raise BadBlockFileError(f"metadata: {error}") from error
    if not right:
        raise BadBlockFileError("header or token ids are not what was written")
    return BlockHead(key, struct.unpack(f"<{tokens}i", ids), tenant, birth)


def decode_file(data: memoryview, key: bytes, identity: FileIdentity) -> StoredBlock:
    """Reads and verifies a whole file. The block's data is a view of `data`, not a copy.

    Sums every byte: run it on a thread.

    Raises:
        BadBlockFileError: It is not the block of this key and identity, or not whole.
    """
    head = decode_head(data, data.nbytes, key, identity)
    tokens = len(head.token_ids)
    kv = data[head_bytes(tokens, identity) :]
    for chunk in chunk_plan(identity.shape, tokens):
        part = kv[chunk.offset : chunk.offset + chunk.length]
        found = chunk_checksum(key, head.birth.birth_id, identity.shape, tokens, chunk, part)
        if found != head.birth.checksums[chunk.index]:
            raise BadBlockFileError(f"checksum of chunk {chunk.index}")
    return StoredBlock(key, head.token_ids, kv, head.birth, head.tenant)


def _header_bytes(tokens: int, identity: FileIdentity) -> int:
    return _FIELDS_BYTES + -(-_SUM_DIGITS * chunk_count(identity.shape, tokens) // 8) * 8


def chunk_count(shape: KvShape, tokens: int) -> int:
    """Length of `chunk_plan`, counted without making it: a tier asks for each file that it lists."""
    layer_bytes = tokens * shape.record_bytes
    if layer_bytes <= CHUNK_BYTES:
        return -(-shape.layers // max(1, CHUNK_BYTES // layer_bytes))
    return shape.layers * -(-tokens // max(1, CHUNK_BYTES // shape.record_bytes))


def _fixed_fields(key: bytes, identity: FileIdentity) -> dict[str, str]:
    """Metadata that reader and writer know without the file."""
    shape = identity.shape
    return {
        "format": FORMAT,
        "layout_version": str(identity.layout_version),
        "model_fingerprint": identity.model_fingerprint.hex(),
        "rope_regime": identity.rope_regime.hex(),
        "dtype": shape.dtype,
        "shape": f"layers={shape.layers},kv_heads={shape.kv_heads},head_dim={shape.head_dim}",
        "checksum_function": CHECKSUM_FUNCTION,
        "key": key.hex(),
    }


def _header(key: bytes, ids: bytes, tenant: str, birth: Birth, identity: FileIdentity) -> bytes:
    """The one header, length and padding included, of a block of this birth."""
    shape, tokens = identity.shape, len(ids) // _ID_BYTES
    metadata = _fixed_fields(key, identity) | {
        "tenant": tenant,
        "birth_id": birth.birth_id.hex(),
        "chunk_checksums": "".join(f"{one:0{_SUM_DIGITS}x}" for one in birth.checksums),
    }
    metadata["record_checksum"] = _record_checksum(metadata, ids)
    end = len(ids) + shape.extent_bytes(tokens)
    header = {
        "__metadata__": metadata,
        "token_ids": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, len(ids)]},
        "kv": {
            "dtype": _DTYPES[shape.dtype],
            "shape": [shape.layers, tokens, 2, shape.kv_heads, shape.head_dim],
            "data_offsets": [len(ids), end],
        },
    }
    length = _header_bytes(tokens, identity)
    return _LENGTH.pack(length) + json.dumps(header, separators=(",", ":")).encode().ljust(length)


def _record_checksum(metadata: Mapping[str, str], ids: bytes) -> str:
    """xxh3-128 over length-prefixed fields in their order, then the token ids."""
    digest = xxhash.xxh3_128()
    for text in (field for pair in metadata.items() for field in pair):
        field = text.encode()
        digest.update(_LENGTH.pack(len(field)))
        digest.update(field)
    digest.update(ids)
    return str(digest.hexdigest())


def _claims(header: bytes, tokens: int, key: bytes, identity: FileIdentity) -> tuple[str, Birth]:
    """Tenant and birth as a header states them; nothing else of it is used, and these are proved afterwards."""
    try:
        metadata: dict[str, Any] = json.loads(header[_LENGTH.size :])["__metadata__"]
        for name, right in _fixed_fields(key, identity).items():
            if metadata[name] != right:
                raise BadBlockFileError(f"{name} is {str(metadata[name])[:80]!r}, not {right!r}")
        sums, birth_id = str(metadata["chunk_checksums"]), bytes.fromhex(metadata["birth_id"])
        checksums = tuple(int(sums[at : at + _SUM_DIGITS], 16) for at in range(0, len(sums), _SUM_DIGITS))
        tenant = metadata["tenant"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadBlockFileError(f"header: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(tenant, str) or len(birth_id) != BIRTH_ID_BYTES:
        raise BadBlockFileError("metadata: tenant or birth id")
    return tenant, Birth(birth_id, tokens, checksums)
