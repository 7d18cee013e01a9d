"""How often each token has been generated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 64


class Tally:
    """Distinct tokens and their counts, as arrays that grow: a penalty reads them without a loop.

    Owned by one sample.
    """

    def __init__(self) -> None:
        self._ids = np.zeros(_FIRST_CAPACITY, dtype=np.int64)
        self._counts = np.zeros(_FIRST_CAPACITY, dtype=np.float32)
        self._slots: dict[int, int] = {}

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens in the order in which they first came, int64 [distinct]."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each of `ids` came, float32 [distinct]: exact up to 2**24."""
        return self._counts[: len(self._slots)]

    def add(self, token_id: int) -> None:
        """One more of this token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token_id
        self._counts[slot] += 1
