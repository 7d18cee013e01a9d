"""mix64: equal to its definition in plain Python, and what it sees."""

import struct

import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shared.kv.checksums import Mix64

_MASK = (1 << 64) - 1
_CPU = torch.device("cpu")


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _reference(identity: bytes, data: bytes) -> int:
    padded = data + b"\0" * (-len(data) % 8)
    total = 0
    for index, (word,) in enumerate(struct.iter_unpack("<Q", padded)):
        total += _mix(word ^ ((index + 1) * 0x9E3779B97F4A7C15 & _MASK))
    return xxhash.xxh3_64_intdigest(identity + struct.pack("<QQ", len(data), total & _MASK))


def _tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def _sum(data: bytes, identity: bytes = b"identity", piece_words: int = 4) -> int:
    return Mix64(_CPU, piece_words).checksum(identity, _tensor(data))


@given(st.binary(max_size=200), st.binary(max_size=20), st.integers(1, 9))
def test_it_is_what_it_says(data: bytes, identity: bytes, piece_words: int) -> None:
    assert _sum(data, identity, piece_words) == _reference(identity, data)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_flipped_bit_is_seen(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    assert _sum(bytes(changed)) != _sum(data)


@given(st.lists(st.integers(0, _MASK), min_size=2, max_size=20), st.data())
def test_swapped_and_moved_words_are_seen(words: list[int], draw: st.DataObject) -> None:
    data = struct.pack(f"<{len(words)}Q", *words)
    one, other = (draw.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    swapped = list(words)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    turned = words[1:] + words[:1]
    for changed in (swapped, turned):
        raw = struct.pack(f"<{len(words)}Q", *changed)
        assert (_sum(raw) == _sum(data)) == (changed == words)


@given(st.binary(min_size=1, max_size=100), st.integers(1, 100))
def test_length_counts_though_the_padding_is_zeros(data: bytes, more: int) -> None:
    assert _sum(data) != _sum(data + b"\0" * more)
    assert _sum(data) != _sum(data[:-1])


def test_zeroed_runs_and_zeros_elsewhere_are_seen() -> None:
    sums = {_sum(b"\0" * 8 * n + b"\1" * 8 + b"\0" * 8 * (20 - n)) for n in range(21)}
    assert len(sums) == 21
    data = bytes(range(1, 201))
    assert _sum(data[:64] + b"\0" * 64 + data[128:]) != _sum(data)


def test_identity_counts() -> None:
    assert _sum(b"data", b"one") != _sum(b"data", b"other")


def test_bytes_that_begin_anywhere() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    for start in range(9):
        piece = data[start : start + 70]
        assert Mix64(_CPU).checksum(b"", piece) == _reference(b"", bytes(piece.tolist()))


def test_large_data_at_the_usual_piece() -> None:
    data = torch.randint(0, 256, ((1 << 20) + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert Mix64(_CPU).checksum(b"x", data) == Mix64(_CPU, 1000).checksum(b"x", data)
    assert Mix64(_CPU).checksum(b"x", data[: 1 << 18]) == _reference(b"x", bytes(data[: 1 << 18].numpy()))
