"""Times to live as people write them: 7d, 12h, 30m, 45s, or seconds."""

from __future__ import annotations

import re
from typing import Final

_PATTERN: Final = re.compile(r"([0-9]{1,12})([smhd]?)", re.ASCII)
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """Seconds that a text means.

    Raises:
        ValueError: When it means none.
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise ValueError(f"{text} is not a time to live such as 7d, 12h, 30m, 45s or 3600")
    return int(found[1]) * _SECONDS[found[2]]


def shown(count: float) -> str:
    """Seconds for a table, in the largest unit that they fill."""
    for unit in ("d", "h", "m"):
        if count >= _SECONDS[unit]:
            return f"{count / _SECONDS[unit]:.3g} {unit}"
    return f"{count:.3g} s"
