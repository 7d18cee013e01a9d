"""Encoding a corpus beside transformers: tokens per second, and memory above the loaded process and its RAM budget.

Both encode the same passages one at a time on the same threads and in the same type; they take turns, some passages
each, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

TURN = 40
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Encoded:
    """Figures of one side."""

    tokens: int
    seconds: float
    memory_mib: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def side_by_side(
    folder: Path, passages: Sequence[tuple[int, ...]], threads: int, ram_bytes: int, tell: Any
) -> tuple[Encoded, Encoded]:
    """Ours and transformers' figures, each in a process of its own, in turns."""
    sides = [_Side(worker, folder, threads, ram_bytes) for worker in (_ours, _transformers)]
    try:
        turns = [passages[start : start + TURN] for start in range(0, len(passages), TURN)]
        seconds, memory = [0.0, 0.0], [0.0, 0.0]
        for number, turn in enumerate(turns):
            for index in (0, 1) if number % 2 else (1, 0):
                took, memory[index] = sides[index].encode(turn)
                seconds[index] += took
            tell(f"encoded {min((number + 1) * TURN, len(passages))} of {len(passages)} passages twice")
        tokens = sum(map(len, passages))
        return Encoded(tokens, seconds[0], memory[0]), Encoded(tokens, seconds[1], memory[1])
    finally:
        for side in sides:
            side.close()


class _Side:
    """A process that encodes what it is sent."""

    def __init__(self, work: Any, folder: Path, threads: int, ram_bytes: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=work, args=(theirs, str(folder), threads, ram_bytes), daemon=True)
        self._process.start()
        self._pipe.recv()  # loaded

    def encode(self, passages: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """Seconds, and MiB above the loaded process and its budget, at most so far."""
        self._pipe.send(list(passages))
        seconds, memory = self._pipe.recv()
        return float(seconds), float(memory)

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()


def _ours(pipe: Connection, folder: str, threads: int, ram_bytes: int) -> None:
    asyncio.run(_encode_through_the_worker(pipe, Path(folder), threads, ram_bytes))


async def _encode_through_the_worker(pipe: Connection, folder: Path, threads: int, ram_bytes: int) -> None:
    """The worker's own parts: queue, encoder, tiers."""
    from prefill_worker.app import PrefillApp
    from prefill_worker.batch_queue import Urgency
    from prefill_worker.settings import PrefillSettings
    from shared import logs

    logs.configure("error", "json")
    torch.set_num_threads(threads)
    settings = PrefillSettings(worker_id="bench", dtype="bfloat16", ram_bytes=ram_bytes, threads=threads)
    app = PrefillApp(settings, folder, "bench")
    await app.start()
    keys = app.model.key_space()

    async def one(ids: tuple[int, ...]) -> None:
        encoding, _ = app.encoder.request(keys.key(ids), ids, store=True, urgency=Urgency.WARMING)
        try:
            await asyncio.shield(encoding.done)
        finally:
            app.encoder.leave(encoding)

    await one((1, 2, 3))
    base = _resident_mib()
    pipe.send(None)
    while (passages := await asyncio.to_thread(pipe.recv)) is not None:
        began = time.perf_counter()
        await asyncio.gather(*(one(ids) for ids in passages))
        pipe.send((time.perf_counter() - began, _peak_mib() - base - ram_bytes / _MIB))
    await app.stop(0.0)


def _transformers(pipe: Connection, folder: str, threads: int, ram_bytes: int) -> None:
    """Its forward over one passage, with the cache that it makes and no logits but the last."""
    del ram_bytes
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.eval()

    @torch.inference_mode()
    def one(ids: tuple[int, ...]) -> None:
        model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    one((1, 2, 3))
    base = _resident_mib()
    pipe.send(None)
    while (passages := pipe.recv()) is not None:
        began = time.perf_counter()
        for ids in passages:
            one(ids)
        pipe.send((time.perf_counter() - began, _peak_mib() - base))


def _resident_mib() -> float:
    return _status_mib("VmRSS")


def _peak_mib() -> float:
    return _status_mib("VmHWM")


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
