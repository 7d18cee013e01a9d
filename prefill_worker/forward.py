"""Forwards over batches of blocks, on the encoder's thread; what fails is cut down until only the guilty fail.

    forward([a b c d]) fails           split: a batch may be too large for the memory that is left
    ├── forward([a b])  ok
    └── forward([c d])  fails
        ├── forward([c]) ok
        └── forward([d]) fails for want of memory
            └── forward([d]) in smaller chunks: ok, or d fails alone

Between the forward and the wire nothing is copied on a CPU: the model writes into the extent, and the block is a view
of it. On CUDA there is one copy, from the device into the extent.

Each forward makes newborns of its own, and each of them ends whole or failed with it: what was shipped of a failed one
is never committed, and the next has another birth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from prefill_worker.newborn import Newborn
from prefill_worker.tiers.block import StoredBlock
from shared import logs
from shared.engine.encode import CHUNK_TOKENS, Block, encode_block, encode_blocks, new_extent
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.transfer.raw import raw_bytes

# Rows of one pass of a block that ran out of memory with CHUNK_TOKENS.
SMALL_CHUNK_TOKENS = 64
# How allocators that raise no error of their own type say it: torch's on CPU, CUDA's runtime, cuBLAS.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class Job(Protocol):
    """What a forward needs to know of a block."""

    @property
    def key(self) -> bytes:
        """32 bytes."""
        ...

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens."""
        ...

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...


J = TypeVar("J", bound=Job)


@dataclass(slots=True)
class Outcome:
    """What came of a batch. Made by the thread, read by the loop after it.

    Attributes:
        made: For each job, in order, its block or why there is none.
        forwards: Tokens and seconds of each forward that succeeded.
        splits: Batches cut in halves.
        retries: Blocks tried again in smaller chunks.
    """

    made: list[StoredBlock | DrystoneError] = field(default_factory=list)
    forwards: list[tuple[int, float]] = field(default_factory=list)
    splits: int = 0
    retries: int = 0


class Forward(Generic[J]):
    """Runs batches on one thread, which owns the model.

    Args:
        model: The model.
        native: Computes batches of one block, where it was proved for this model.
        on_newborn: Told on the thread of each job's newborn as its forward begins, and None when it has failed.
    """

    def __init__(
        self,
        model: ServedModel,
        native: NativeEncoder | None,
        on_newborn: Callable[[J, Newborn | None], None] = lambda _job, _newborn: None,
    ) -> None:
        self._model = model
        self._native = native
        self._on_newborn = on_newborn
        self._log = logs.get("forward")
        # Written by the loop, read by the thread between forwards: what is left of a batch then fails.
        self.stopping = False

    def run(self, jobs: Sequence[J]) -> Outcome:
        """Encodes a batch; never raises for what a block or the memory did."""
        outcome = Outcome()
        self._encode(jobs, outcome, CHUNK_TOKENS)
        return outcome

    def _encode(self, jobs: Sequence[J], outcome: Outcome, chunk_tokens: int) -> None:
        if self.stopping:
            outcome.made += [DrystoneError(Reason.DRAINING, "the prefill worker is stopping") for _ in jobs]
            return
        try:
            outcome.made += self._forward(jobs, outcome, chunk_tokens)
        except Exception as error:  # noqa: BLE001 - whatever it was, only the blocks that it comes from may fail
            out_of_memory = _is_out_of_memory(error)
            self._log.warning("forward_failed", blocks=len(jobs), chunk_tokens=chunk_tokens, exc_info=error)
            failure = _unavailable(error)
            retry = out_of_memory and chunk_tokens > SMALL_CHUNK_TOKENS
        else:
            return
        # Out of the handler the traceback is gone, and with it the failed forward's extents and activations.
        if out_of_memory and self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(jobs) > 1:
            outcome.splits += 1
            self._encode(jobs[: len(jobs) // 2], outcome, chunk_tokens)
            self._encode(jobs[len(jobs) // 2 :], outcome, chunk_tokens)
        elif retry:
            outcome.retries += 1
            self._encode(jobs, outcome, SMALL_CHUNK_TOKENS)
        else:
            outcome.made.append(failure)

    def _forward(self, jobs: Sequence[J], outcome: Outcome, chunk_tokens: int) -> list[StoredBlock | DrystoneError]:
        began = time.monotonic()
        shape = self._model.geometry.shape
        blocks: list[Block] = [(job.token_ids, new_extent(shape, len(job.token_ids))) for job in jobs]
        newborns = [
            Newborn(job.key, job.token_ids, job.tenant, shape, raw_bytes(extent))
            for job, (_, extent) in zip(jobs, blocks, strict=True)
        ]
        try:
            for job, newborn in zip(jobs, newborns, strict=True):
                self._on_newborn(job, newborn)
            errors = self._fill(blocks, newborns, chunk_tokens)
        except BaseException as error:
            for job, newborn in zip(jobs, newborns, strict=True):
                self._fail(job, newborn, error)
            raise
        made: list[StoredBlock | DrystoneError] = []
        for job, newborn, wrong in zip(jobs, newborns, errors, strict=True):
            if wrong is None:
                made.append(newborn.whole())
                continue
            self._log.error("block_not_finite", key=job.key.hex(), detail=str(wrong))
            wrong.__traceback__ = None  # its frames hold the extents
            self._fail(job, newborn, wrong)
            made.append(_unavailable(wrong))
        outcome.forwards.append((sum(len(job.token_ids) for job in jobs), time.monotonic() - began))
        return made

    def _fill(
        self, blocks: Sequence[Block], newborns: Sequence[Newborn], chunk_tokens: int
    ) -> Sequence[ArithmeticError | None]:
        """Fills the extents; for each None, or why its KV cannot be served."""
        if len(blocks) > 1:
            rows = sum(len(token_ids) for token_ids, _ in blocks)
            return encode_blocks(self._model, blocks, pack_tokens=rows, progress=newborns)
        [(token_ids, extent)], [newborn] = blocks, newborns
        encode_block(self._model, list(token_ids), extent, chunk_tokens, self._native, newborn)
        return [None]

    def _fail(self, job: J, newborn: Newborn, error: BaseException) -> None:
        newborn.fail(str(error) or type(error).__name__)
        self._on_newborn(job, None)


def packs(model: ServedModel) -> bool:
    """True where several blocks in one forward are faster than one after another (docs/measurements.md)."""
    return model.device.type == "cuda" and model.dtype != torch.float32


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _unavailable(error: Exception) -> DrystoneError:
    """Says why in words only: the error itself would keep the failed forward's tensors."""
    return DrystoneError(Reason.BLOCK_UNAVAILABLE, f"a block could not be encoded: {error}")
