"""Room for runs of bytes that come and go in one order, such as staging memory between two processes.

    0                                                    capacity
    │ run 4 │ run 5 │   free   │ run 2 │ run 3 │ too short │
                    ▲ next     ▲ oldest

A run is never split: where it does not fit before the end it begins at 0.
"""

from __future__ import annotations

from collections import deque


class Ring:
    """First in, first out.

    Args:
        capacity: Bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._runs: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        """Runs that are there."""
        return len(self._runs)

    @property
    def oldest(self) -> tuple[int, int]:
        """Offset and length of the run that leaves next; IndexError where there is none."""
        return self._runs[0]

    def take(self, length: int) -> int | None:
        """Offset of `length` bytes that nobody has; None while there is no such room."""
        offset = self._place(length)
        if offset is not None:
            self._runs.append((offset, length))
        return offset

    def drop(self) -> None:
        """The oldest run leaves."""
        self._runs.popleft()

    def _place(self, length: int) -> int | None:
        if not 0 < length <= self.capacity:
            return None
        if not self._runs:
            return 0
        first, (last, size) = self._runs[0][0], self._runs[-1]
        after = last + size
        if last >= first:  # what is taken is in one piece, or begins anew at 0 with nothing before it
            if after + length <= self.capacity:
                return after
            return 0 if length <= first else None
        return after if after + length <= first else None
