"""Requests that arrive and leave at random, for long: memory stays what it was, and idle is idle.

    python -m tests.load.soak [--requests 10000] [--seed 1]

A whole Drystone in this process, a tiny random model, real sockets. Prints the resident memory as it goes, and ends
with 1 when it has grown by more than 2 % since the first tenth of the requests, or something is held at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import drystone
from drystone import Document
from shared import logs
from tests.support.stacks import Served, serving
from tests.support.tiny_models import make_tiny

GROWTH_ALLOWED = 0.02
_STATM = Path("/proc/self/statm")
_PAGE = 4096


def resident_bytes() -> int:
    """Resident memory of this process, without what the allocator keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return int(_STATM.read_text().split()[1]) * _PAGE


class Soak:
    """Requests of every kind, over a corpus larger than the pool, so that blocks come and go."""

    def __init__(self, served: Served, seed: int, concurrency: int) -> None:
        self._served = served
        self._draw = random.Random(seed)
        self._slots = asyncio.Semaphore(concurrency)
        self.outcomes: Counter[str] = Counter()

    async def run(self, requests: int) -> None:
        """Sends `requests` requests, some of which leave early, and waits for all."""
        async with asyncio.TaskGroup() as group:
            for _ in range(requests):
                await self._slots.acquire()
                group.create_task(self._one(self._options(), self._draw.random()))
        await self._served.until_idle(seconds=30.0)

    def _options(self) -> dict[str, Any]:
        draw = self._draw
        # 200 passages: more than pool and store hold, and few enough that bounded caches are full early.
        texts = [f"Passage {number} " + "stone wall " * (1 + number % 29) for number in draw.choices(range(200), k=4)]
        options: dict[str, Any] = {
            "question": "Which stone? " * draw.choice([1, 2, 9]),
            "documents": [Document(text=text) for text in texts[: draw.randint(1, 4)]],
            "max_new_tokens": draw.randint(1, 24),
            "temperature": draw.choice([0.0, 1.0]),
            "seed": draw.randrange(1000),
            "n": draw.choice([1, 1, 1, 3]),
            "ignore_eos": True,
            "priority": draw.choice(["low", "normal", "high"]),
            "keep_tail": draw.random() < 0.3,
        }
        if draw.random() < 0.1:
            options |= {"regex": "[a-z]{1,5}", "ignore_eos": False}
        if draw.random() < 0.1:
            options["attention"] = "full"
        return options

    async def _one(self, options: dict[str, Any], luck: float) -> None:
        leaves = luck < 0.4
        try:
            async with asyncio.timeout(luck * 0.3 if leaves else 60.0):
                await self._served.client.generate(**options)
            self.outcomes["answered"] += 1
        except TimeoutError:
            self.outcomes["left"] += 1
        except drystone.DrystoneError as error:
            self.outcomes[str(error.reason)] += 1
        finally:
            self._slots.release()


async def soak(folder: Path, requests: int, seed: int) -> bool:
    """Runs it and says how memory went; True when it stayed."""
    decode = {"pool_bytes": 8 << 20, "max_waiting": 64}
    async with serving(folder, decode_settings=decode, prefill_settings={"ram_bytes": 8 << 20}) as served:
        soaking = Soak(served, seed, concurrency=16)
        await soaking.run(max(requests // 10, 1))
        base = resident_bytes()
        for part in range(1, 10):
            await soaking.run(requests // 10)
            now = resident_bytes()
            done = (part + 1) * requests // 10
            print(f"{done:6d} requests  {now / 2**20:7.1f} MiB  {now / base - 1:+.2%}", flush=True)
        print(", ".join(f"{name} {count}" for name, count in soaking.outcomes.most_common()))
        return resident_bytes() <= base * (1 + GROWTH_ALLOWED)


def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="requests in all")
    parser.add_argument("--seed", type=int, default=1, help="seed of what is asked and who leaves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs.configure("error", "json")
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny("llama-default", Path(scratch) / "model")
        stayed = asyncio.run(soak(folder, options.requests, options.seed))
    print("memory stayed" if stayed else f"memory grew by more than {GROWTH_ALLOWED:.0%}")
    return 0 if stayed else 1


if __name__ == "__main__":
    sys.exit(main())
