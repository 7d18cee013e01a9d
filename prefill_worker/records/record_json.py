"""A record as one small JSON object with a checksum, the form in which workers share it.

    {"version": 1, "key": hex, "token_ids": [..], "tenant": "..", "tenant_salt": hex, "tags": [..],
     "expires_at": unix seconds or null, "pinned": bool, "checksum": hex}

The checksum is BLAKE2b-128 of the canonical JSON of the rest: sorted names, no white space, ASCII.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import Any

from prefill_worker.records.record import BlockRecord

VERSION = 1

_MAX_TOKEN_ID = (1 << 32) - 1


def to_json(record: BlockRecord) -> bytes:
    """The record's bytes; equal records have equal bytes."""
    fields: dict[str, Any] = {
        "version": VERSION,
        "key": record.key.hex(),
        "token_ids": record.token_ids,
        "tenant": record.tenant,
        "tenant_salt": record.tenant_salt.hex(),
        "tags": record.tags,
        "expires_at": record.expires_at,
        "pinned": record.pinned,
    }
    return _canonical({**fields, "checksum": _checksum(fields)})


def from_json(data: bytes) -> BlockRecord:
    """The record in some bytes.

    Raises:
        ValueError: They are not the bytes that `to_json` made; says why.
    """
    try:
        fields = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - one kind of error for every damage
    if fields.pop("checksum", None) != _checksum(fields):
        raise ValueError("the checksum is not of the content")
    if fields.get("version") != VERSION:
        raise ValueError(f"version {fields.get('version')!r}, and this one reads {VERSION}")
    try:
        record = BlockRecord(
            key=bytes.fromhex(fields["key"]),
            token_ids=tuple(fields["token_ids"]),
            tenant=fields["tenant"],
            tenant_salt=bytes.fromhex(fields["tenant_salt"]),
            tags=tuple(fields["tags"]),
            expires_at=fields["expires_at"],
            pinned=fields["pinned"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record: {error!r}") from error
    if not _is_typed(record):
        raise ValueError("a field is of the wrong kind")
    return record if record.expires_at is None else replace(record, expires_at=float(record.expires_at))


def _is_typed(record: BlockRecord) -> bool:
    return (
        all(type(token) is int and 0 <= token <= _MAX_TOKEN_ID for token in record.token_ids)
        and all(isinstance(text, str) and _is_utf8(text) for text in (record.tenant, *record.tags))
        and (record.expires_at is None or _is_time(record.expires_at))
        and isinstance(record.pinned, bool)
    )


def _is_time(value: object) -> bool:
    """JSON's numbers have no bound: an integer may be more than any float, and what is kept is a float."""
    try:
        return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type] # its type is known here
    except OverflowError:
        return False


def _is_utf8(text: str) -> bool:
    """JSON's text may hold half of a pair, which no file keeps."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.blake2b(_canonical(fields), digest_size=16).hexdigest()


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
