"""Token ids of texts that were tokenised lately."""

import hashlib
import threading
from collections import OrderedDict


class TokenCache:
    """Least recently used texts, bounded by the tokens they became. Safe for many threads.

    Args:
        max_tokens: Most tokens to keep over all texts. 0 keeps nothing.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._held_tokens = 0
        self._ids: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(text: str, *, allow_special: bool) -> bytes:
        """Digest that stands for a text and the way it is tokenised."""
        digest = hashlib.blake2b(text.encode(), digest_size=24, person=b"special" if allow_special else b"plain")
        return digest.digest()

    @property
    def held_tokens(self) -> int:
        """Tokens kept now."""
        return self._held_tokens

    def get(self, key: bytes) -> tuple[int, ...] | None:
        """Ids kept under a key, which becomes the most recently used."""
        with self._lock:
            ids = self._ids.get(key)
            if ids is not None:
                self._ids.move_to_end(key)
            return ids

    def put(self, key: bytes, ids: tuple[int, ...]) -> None:
        """Keep ids, letting the least recently used ones go. Ids beyond the whole bound are not kept."""
        # An empty text costs one token, so that the number of entries is bounded too.
        if _cost(ids) > self._max_tokens:
            return
        with self._lock:
            if (replaced := self._ids.pop(key, None)) is not None:
                self._held_tokens -= _cost(replaced)
            self._ids[key] = ids
            self._held_tokens += _cost(ids)
            while self._held_tokens > self._max_tokens:
                _, oldest = self._ids.popitem(last=False)
                self._held_tokens -= _cost(oldest)


def _cost(ids: tuple[int, ...]) -> int:
    return max(len(ids), 1)
