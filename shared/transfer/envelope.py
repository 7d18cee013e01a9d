"""Frames of a transfer: a checked header, and for chunks one raw frame. No pickle, sizes first."""

from __future__ import annotations

import xxhash
from google.protobuf.message import DecodeError

from shared.internal.v1.transfer_pb2 import Envelope, TransferHeader

MAX_HEADER_BYTES = 64 << 10


class MalformedFrameError(Exception):
    """A header that is too long, does not verify, or cannot be read; its content is not used."""


def seal(header: TransferHeader) -> bytes:
    """Frame 0 of a message."""
    raw = header.SerializeToString()
    return Envelope(header=raw, header_checksum=xxhash.xxh3_64_intdigest(raw)).SerializeToString()


def unseal(frame: bytes | memoryview) -> TransferHeader:
    """The header in frame 0; raises `MalformedFrameError`."""
    if len(frame) > MAX_HEADER_BYTES:
        raise MalformedFrameError(f"header of {len(frame)} bytes; limit {MAX_HEADER_BYTES}")
    try:
        envelope = Envelope.FromString(bytes(frame))
        if xxhash.xxh3_64_intdigest(envelope.header) != envelope.header_checksum:
            raise MalformedFrameError("header checksum does not match")
        header = TransferHeader.FromString(envelope.header)
    except DecodeError as error:
        raise MalformedFrameError(f"header cannot be decoded: {error}") from error
    if header.WhichOneof("message") is None:
        raise MalformedFrameError("header without a message")
    return header
