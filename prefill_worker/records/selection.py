"""Which records are asked for."""

from __future__ import annotations

import string
from dataclasses import dataclass

from shared.errors import InvalidRequestError, Reason
from shared.kv.keys import KEY_BYTES

_DIGITS = 2 * KEY_BYTES


@dataclass(frozen=True, slots=True)
class Selection:
    """Criteria on records; those that are given must all match.

    Attributes:
        key_prefix: Beginning of a key in hexadecimal digits.
        tags: Any of these; none means all.
        tenant: Whose; empty is a tenant too. None: everybody's.
        after_key: Only keys after this one, in the order of their bytes.
        limit: Most records, the first ones in the order of their keys. 0: all.
    """

    key_prefix: str = ""
    tags: tuple[str, ...] = ()
    tenant: str | None = None
    after_key: bytes = b""
    limit: int = 0

    @property
    def key_range(self) -> tuple[bytes, bytes]:
        """First and last key that the prefix allows.

        Raises:
            InvalidRequestError: The prefix is not the beginning of a key.
        """
        if len(self.key_prefix) > _DIGITS or not set(self.key_prefix) <= set(string.hexdigits):
            raise InvalidRequestError(
                Reason.INVALID_BLOCK_KEY,
                "key_prefix",
                "is not the beginning of a block key",
                limit=f"up to {_DIGITS} hexadecimal digits",
                value=repr(self.key_prefix[:80]),
            )
        return bytes.fromhex(self.key_prefix.ljust(_DIGITS, "0")), bytes.fromhex(self.key_prefix.ljust(_DIGITS, "f"))
