"""A token's text as bytes, which need not be whole characters."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTES = 256


class TokenBytes:
    """Tokens to bytes for one tokenizer. What must be read from it is read at the first question.

    Byte-level tokens (GPT-2's alphabet) and byte fallback (SentencePiece) are taken apart; of any other
    tokenizer a token's bytes are what decoding it alone gives.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getitem__(self, token_id: int) -> bytes:
        """Its bytes; none for an id that the tokenizer does not have."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return str(piece).encode()
        if "ByteLevel" in self._decoders:
            if all(character in self._alphabet for character in piece):
                return bytes(self._alphabet[character] for character in piece)
        elif "ByteFallback" in self._decoders:
            byte = _BYTE.fullmatch(piece)
            return bytes.fromhex(byte[1]) if byte else str(piece).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> frozenset[str]:
        return frozenset(_kinds(json.loads(self._tokenizer.to_str()).get("decoder")))

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        # Printable Latin-1 stands for itself; the other bytes, in order, for the characters from 256 on.
        printable = [byte for byte in range(_BYTES) if chr(byte).isprintable() and chr(byte) != " "]
        rest = [byte for byte in range(_BYTES) if byte not in set(printable)]
        return {chr(byte): byte for byte in printable} | {chr(_BYTES + at): byte for at, byte in enumerate(rest)}


def _kinds(decoder: Any) -> list[str]:
    if not isinstance(decoder, dict):
        return []
    inner = [kind for each in decoder.get("decoders", ()) for kind in _kinds(each)]
    return [str(decoder.get("type")), *inner]
