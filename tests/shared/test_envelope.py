"""Frames: whatever bytes come, either the header that was sealed or one kind of error."""

from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import given, settings

from shared.internal.v1.common_pb2 import Reservation, WorkerIdentity
from shared.internal.v1.transfer_pb2 import Chunk, Envelope, Ping, TransferHeader
from shared.transfer.envelope import MAX_HEADER_BYTES, MalformedFrameError, seal, unseal

HEADER = TransferHeader(
    chunk=Chunk(
        transfer_id=5,
        reservation=Reservation(worker=WorkerIdentity(worker_id="d", incarnation=7), reservation_id=3, epoch=2),
        key=b"k" * 32,
        birth_id=b"b" * 16,
        chunk_index=4,
        offset=1 << 40,
        length=1 << 20,
        checksum=2**64 - 1,
    )
)
SEALED = seal(HEADER)


def test_there_and_back() -> None:
    assert unseal(SEALED) == HEADER
    assert unseal(memoryview(SEALED)) == HEADER
    assert unseal(seal(TransferHeader(ping=Ping(nonce=0)))).HasField("ping")


@settings(max_examples=400)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: SEALED[:80] + tail))
def test_any_bytes_are_malformed_at_worst(frame: bytes) -> None:
    with contextlib.suppress(MalformedFrameError):
        assert unseal(frame).WhichOneof("message")


@settings(max_examples=400)
@given(st.binary(max_size=120))
def test_a_right_checksum_does_not_make_a_header(content: bytes) -> None:
    frame = Envelope(header=content, header_checksum=xxhash.xxh3_64_intdigest(content)).SerializeToString()
    with contextlib.suppress(MalformedFrameError):
        assert unseal(frame).WhichOneof("message")


@given(st.integers(0, len(SEALED) * 8 - 1))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    frame = bytearray(SEALED)
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedFrameError):
        unseal(bytes(frame))


@pytest.mark.parametrize("cut", [0, 1, 8, len(SEALED) // 2, len(SEALED) - 1])
def test_a_cut_frame_is_noticed(cut: int) -> None:
    with pytest.raises(MalformedFrameError):
        unseal(SEALED[:cut])


def test_size_is_checked_before_content() -> None:
    with pytest.raises(MalformedFrameError, match=f"{MAX_HEADER_BYTES + 1} bytes; limit {MAX_HEADER_BYTES}"):
        unseal(bytes(MAX_HEADER_BYTES + 1))


def test_an_empty_header_is_no_message() -> None:
    with pytest.raises(MalformedFrameError, match="without a message"):
        unseal(seal(TransferHeader()))
