"""Headers that nobody would send: refused or ignored, never a crash, never a wrong byte to be seen.

Inputs are mutated from a corpus; one that is answered in a way not seen before joins it, and is mutated in turn.
`DRYSTONE_FUZZ_SECONDS=600` goes on for so long; `DRYSTONE_FUZZ_KEEP=1` writes what joined to the corpus.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.receiving.pairs import MAX_PAIRS
from shared.internal.v1.transfer_pb2 import (
    Abort,
    GroupAsk,
    GroupEnd,
    GroupInvite,
    Ping,
    RefusalReason,
    Refused,
    TransferHeader,
)
from shared.transfer.envelope import MAX_HEADER_BYTES, seal
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.hand_wire import HandWire
from tests.support.wire import Frames

CORPUS = Path(__file__).parent / "corpus"
SECONDS = float(os.environ.get("DRYSTONE_FUZZ_SECONDS", "0"))
INPUTS = 4000
# Inputs for one pair of ends: long enough for states to build up.
_LIFE = 200


def conversation() -> tuple[list[bytes], list[bytes]]:
    """Headers of a block's way, as they are said there and back."""
    wire = HandWire()
    there: list[bytes] = []
    back: list[bytes] = []
    wire.expect(1)
    wire.ship(1, 1)
    while wire.there or wire.back:
        while wire.there:
            frames = wire.there.popleft()
            there.append(frames[0])
            wire.receive(frames)
        while wire.back:
            frame = wire.back.popleft()
            back.append(frame)
            wire.hear(frame)
    wire.close()
    more = [Ping(nonce=1), Abort(transfer_id=1, reason="x"), GroupAsk(), GroupEnd(group=1, reason="IDLE")]
    there += [seal(_around(message)) for message in more]
    refusals = [Refused(transfer_id=one % 2, reason=one, message="m") for one in RefusalReason.values()]
    back += [seal(_around(one)) for one in (*refusals, GroupInvite(group=1, name="n", port=9), GroupEnd(reason="x"))]
    return there, back


def _around(message: Message) -> TransferHeader:
    [field] = [one for one in TransferHeader.DESCRIPTOR.fields if one.message_type is message.DESCRIPTOR]
    header = TransferHeader()
    getattr(header, field.name).CopyFrom(message)
    header_field = getattr(header, field.name)
    header_field.SetInParent()
    return header


class Mutator:
    """Spoils sealed headers: as they are, or beneath a checksum that is right."""

    def __init__(self, seed: int, corpus: list[bytes]) -> None:
        self.draw = random.Random(seed)
        self.corpus = corpus

    def next(self) -> bytes:
        raw = self.draw.choice(self.corpus)
        if self.draw.random() < 0.15:
            return self._spoilt(raw)
        header = TransferHeader()
        inner = _inner(raw)
        for _ in range(self.draw.choice([1, 1, 2, 4])):
            inner = self._spoilt(inner) if self.draw.random() < 0.3 else self._field_changed(inner)
        try:
            header.ParseFromString(inner)
        except Exception:  # noqa: BLE001 - protobuf's implementations differ in what they raise
            return _sealed_bytes(inner)
        return _sealed_bytes(inner)

    def _spoilt(self, raw: bytes) -> bytes:
        data, draw = bytearray(raw), self.draw
        match draw.randrange(5):
            case 0 if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1:
                del data[draw.randrange(len(data) + 1) :]
            case 2:
                at = draw.randrange(len(data) + 1)
                data[at:at] = draw.randbytes(draw.choice([1, 2, 9, 100]))
            case 3:
                data += _inner(draw.choice(self.corpus))
            case _:
                data = bytearray(draw.randbytes(draw.choice([0, 1, 7, 64, 3000, MAX_HEADER_BYTES + 1])))
        return bytes(data)

    def _field_changed(self, inner: bytes) -> bytes:
        header = TransferHeader()
        try:
            header.ParseFromString(inner)
        except Exception:  # noqa: BLE001 - likewise
            return inner
        kind = header.WhichOneof("message")
        if kind is not None:
            self._change(getattr(header, kind))
        return header.SerializeToString()

    def _change(self, message: Any) -> None:
        fields = message.DESCRIPTOR.fields
        if not fields:
            return
        field = self.draw.choice(fields)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            self._change(getattr(message, field.name))
        elif field.type == FieldDescriptor.TYPE_BYTES:
            setattr(message, field.name, self.draw.randbytes(self.draw.choice([0, 1, 16, 32, 33, 2000])))
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, self.draw.choice(["", "x", "é" * 300, "gloo", "nccl", "{}%s\n"]))
        elif field.type == FieldDescriptor.TYPE_ENUM:
            setattr(message, field.name, self.draw.choice([0, 1, 7, 13, 99]))
        else:
            bits = 32 if field.type == FieldDescriptor.TYPE_UINT32 else 64
            old = int(getattr(message, field.name))
            near = [old + 1, max(old - 1, 0), 0, 1, (1 << bits) - 1, 1 << (bits - 1), self.draw.getrandbits(bits)]
            if field.type != FieldDescriptor.TYPE_BOOL:
                setattr(message, field.name, self.draw.choice(near) % (1 << bits))


def _inner(sealed: bytes) -> bytes:
    from shared.internal.v1.transfer_pb2 import Envelope

    envelope = Envelope()
    try:
        envelope.ParseFromString(sealed)
    except Exception:  # noqa: BLE001 - likewise
        return sealed
    return envelope.header


def _sealed_bytes(inner: bytes) -> bytes:
    import xxhash

    from shared.internal.v1.transfer_pb2 import Envelope

    return Envelope(header=inner, header_checksum=xxhash.xxh3_64_intdigest(inner)).SerializeToString()


def _kept(direction: str) -> list[bytes]:
    file = CORPUS / f"{direction}.txt"
    return [bytes.fromhex(line) for line in file.read_text().split()] if file.exists() else []


def _keep(direction: str, corpus: list[bytes], first: int) -> None:
    if os.environ.get("DRYSTONE_FUZZ_KEEP"):
        lines = dict.fromkeys(one.hex() for one in (*_kept(direction), *corpus[first:]) if len(one) < 4096)
        (CORPUS / f"{direction}.txt").write_text("".join(f"{line}\n" for line in lines))


def _rounds() -> Iterator[int]:
    """Numbers of inputs: as many as CI runs, or as time allows."""
    end, number = time.monotonic() + SECONDS, 0
    while number < INPUTS or time.monotonic() < end:
        yield number
        number += 1


def _shape(text: str) -> str:
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", text)[:80]


def _greeted(data: bool) -> HandWire:  # noqa: FBT001 - which half of a conversation has been
    wire = HandWire()
    for number in (1, 2):
        wire.expect(number)
        wire.ship(number, number)
    wire.receive(wire.there.popleft())
    if data:
        wire.hear(wire.back.popleft())
    return wire


def _over(wire: HandWire) -> None:
    wire.check()
    wire.there.clear()
    wire.back.clear()
    wire.close()
    assert_all_free_after_eviction(wire.pool)


def test_what_a_receiver_is_told() -> None:
    seeds, _ = conversation()
    mutator = Mutator(1, [*seeds, *_kept("there")])
    first, seen, wire = len(mutator.corpus), set[str](), _greeted(data=False)
    for number in _rounds():
        if number % _LIFE == _LIFE - 1:
            _over(wire)
            wire = _greeted(data=False)
        header = mutator.next()
        frames: Frames = [header]
        frames += [b"x" * mutator.draw.choice([0, 1, 1 << 16])] * mutator.draw.choice([0, 0, 1, 1, 2, 5])
        answer = wire.receive(frames)
        assert len(wire.receiver.pairs) <= min(2, MAX_PAIRS)
        assert not wire.receiver.groups.processes
        if answer is not None:
            assert len(seal(answer)) < MAX_HEADER_BYTES
        shape = "" if answer is None else _shape(str(answer))
        if shape not in seen and len(seen) < 400:
            seen.add(shape)
            mutator.corpus.append(header)
        wire.back.clear()
    _over(wire)
    assert len(seen) > 10
    _keep("there", mutator.corpus, first)


def test_what_a_sender_is_told() -> None:
    _, seeds = conversation()
    mutator = Mutator(2, [*seeds, *_kept("back")])
    first, seen, wire = len(mutator.corpus), set[str](), _greeted(data=True)
    for number in _rounds():
        if number % _LIFE == _LIFE - 1 or wire.link.idle:
            _over(wire)
            wire = _greeted(data=True)
        header = mutator.next()
        shape = _shape(f"{wire.hear(header)} {wire.link.state} {sorted(map(str, wire.outcomes.values()))}")
        if shape not in seen and len(seen) < 400:
            seen.add(shape)
            mutator.corpus.append(header)
        wire.there.clear()
    _over(wire)
    assert len(seen) > 10
    _keep("back", mutator.corpus, first)


@pytest.fixture(scope="module")
def ends() -> Iterator[HandWire]:
    wire = _greeted(data=True)
    yield wire
    _over(wire)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=4), st.data())
def test_bytes_that_are_no_message(ends: HandWire, frames: list[bytes], data: st.DataObject) -> None:
    ends.receive(frames)
    ends.hear(_sealed_bytes(frames[0]) if frames and data.draw(st.booleans()) else b"".join(frames))
