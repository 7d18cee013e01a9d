"""mix64: a checksum that a GPU computes in parallel, with equal values on a CPU.

A hash that walks its input cannot run on thousands of cores; a sum can, but does not see where a word lies. So each
64-bit word is mixed with its position first, and the sums of the mixed words are added:

    bytes │ word 0 │ word 1 │ … │ last, padded with zeros │          little-endian, 8 bytes each
              │        │                 │
          mix(w ^ p(0)) + mix(w ^ p(1)) + … + mix(w ^ p(n-1))         modulo 2^64
                               │
            xxh3-64 of (identity, length, that sum)                   on the host, 16 bytes and an identity

`mix` maps 64-bit words one to one, so a change of any single word always changes the sum; other changes (words swapped
or moved, runs of zeros, several words) go unseen once in 2^64. It is no defence against somebody who means to deceive:
CURVE is.
"""

from __future__ import annotations

import struct

import torch
import xxhash

CHECKSUM_FUNCTION_MIX64 = "mix64"
WORD_BYTES = 8
# Words mixed at a time: two arrays of that size are all the scratch memory there is.
_PIECE_WORDS = {"cpu": 1 << 15, "cuda": 1 << 21}
# Odd constants of splitmix64 (Steele, Lea, Flood 2014), as signed numbers: int64 arithmetic wraps around.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_MASK = (1 << 64) - 1


class Mix64:
    """Computes mix64 of bytes on one device. Keeps its scratch memory, so it is used by one thread at a time.

    Args:
        device: Where the bytes lie.
        piece_words: Words mixed at a time; the value does not depend on it.
    """

    def __init__(self, device: torch.device, piece_words: int | None = None) -> None:
        self._size = piece_words or _PIECE_WORDS.get(device.type, _PIECE_WORDS["cpu"])
        self._steps = torch.arange(1, self._size + 1, dtype=torch.int64, device=device) * _GOLDEN
        self._mixed = torch.empty_like(self._steps)
        self._shifted = torch.empty_like(self._steps)

    def checksum(self, identity: bytes, data: torch.Tensor) -> int:
        """mix64 of `data` as `identity`; unsigned. Waits for the device.

        Args:
            identity: What the bytes are (`chunk_identity`).
            data: uint8 [bytes], contiguous, on this device.
        """
        whole = len(data) // WORD_BYTES
        words = _words(data[: whole * WORD_BYTES])
        total = sum(
            (self._sum(words[start : start + self._size], start) for start in range(0, whole, self._size)),
            start=torch.zeros((), dtype=torch.int64, device=data.device),
        )
        rest = data[whole * WORD_BYTES :]
        if len(rest):
            last = torch.zeros(WORD_BYTES, dtype=torch.uint8, device=data.device)
            last[: len(rest)] = rest
            total = total + self._sum(last.view(torch.int64), whole)
        return xxhash.xxh3_64_intdigest(identity + struct.pack("<QQ", len(data), int(total) & _MASK))

    def _sum(self, words: torch.Tensor, position: int) -> torch.Tensor:
        """Sum of the mixed words [n] that begin at `position`, a scalar; n is at most a piece."""
        mixed, shifted = self._mixed[: len(words)], self._shifted[: len(words)]
        torch.add(self._steps[: len(words)], _signed(position * _GOLDEN), out=mixed)
        mixed ^= words
        for bits, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
            torch.bitwise_right_shift(mixed, bits, out=shifted)
            shifted &= (1 << (64 - bits)) - 1  # the sign came in from the left
            mixed ^= shifted
            if factor != 1:
                mixed *= factor
        return mixed.sum()


def _words(data: torch.Tensor) -> torch.Tensor:
    """The bytes as int64; copied where they do not begin at a multiple of eight."""
    if data.storage_offset() % WORD_BYTES or data.data_ptr() % WORD_BYTES:
        data = data.clone()
    return data.view(torch.int64)


def _signed(number: int) -> int:
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number
