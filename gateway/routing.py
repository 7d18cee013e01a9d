"""Which worker: pure functions over what the gateway knows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

LOAD_FACTOR = 1.25


def rendezvous_order(key: bytes, workers: Sequence[str]) -> list[str]:
    """Workers by falling score for a key (highest random weight, Thaler & Ravishankar 1998).

    Every gateway computes the same order without talking to another; a worker that leaves moves only
    its own keys.
    """
    return sorted(workers, key=lambda worker: (_score(key, worker), worker), reverse=True)


def prefill_order(key: bytes, loads: Mapping[str, int]) -> list[str]:
    """Rendezvous order with bounded load: a worker above 1.25 times the mean goes behind the others.

    Args:
        key: Block key.
        loads: Blocks under way, by worker.
    """
    bound = math.ceil(LOAD_FACTOR * (sum(loads.values()) + 1) / max(len(loads), 1))
    order = rendezvous_order(key, list(loads))
    return [w for w in order if loads[w] < bound] + [w for w in order if loads[w] >= bound]


def decode_choice(loads: Mapping[str, int], resident: Mapping[str, int], prompt_tokens: int) -> str:
    """The decode worker with the least cost in tokens.

    A worker costs the tokens that it is not known to hold, and a prompt's worth for each request it runs.
    """
    return min(loads, key=lambda worker: (loads[worker] * prompt_tokens - resident.get(worker, 0), worker))


def _score(key: bytes, worker: str) -> bytes:
    return hashlib.blake2b(key, key=hashlib.blake2b(worker.encode(), digest_size=32).digest(), digest_size=8).digest()
