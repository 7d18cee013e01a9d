"""The queue in front of the model: each block is encoded once however many ask, the most urgent first.

On a CPU a batch is one block, for a packed block-diagonal mask costs the square of the whole (measured 5 to 8 times
slower; docs/measurements.md); the queue is asked again after each, so that interactive work enters between two
warming blocks. On CUDA a batch is as many blocks as fit the token budget, in one forward.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from prefill_worker.batch_queue import PATIENCE_SECONDS, BatchQueue, Urgency
from prefill_worker.encode_rate import EncodeRate
from prefill_worker.encoding import Encoding
from prefill_worker.forward import Forward, Outcome, packs
from prefill_worker.newborn import Newborn
from prefill_worker.tiers.block import StoredBlock
from shared import logs
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason


class Encoder:
    """Encodes blocks on one thread. All state belongs to the event loop.

    An encoding is in `_open` from its first request until its block is made, failed or unwanted, and in the queue for
    the part of it before the thread takes it. Those who wait may ship its newborn while the forward runs. What is made
    is handed to `keep` and to those who wait; the encoder only counts its bytes, from the beginning of the forward,
    until they have left.

    Args:
        model: The model; the encoder's thread owns it.
        keep: Takes each block that somebody wants stored, on the loop, before those who wait for it see it.
        max_queued_blocks: Blocks that may wait; half of them for warming.
        max_queued_tokens: Their tokens, likewise.
        max_unshipped_bytes: Extents that may be held by requests before encoding pauses. Never exceeded, but by a
            single longer block when nothing else is held.
        batch_tokens: Rows of one forward where blocks are packed.
        native: Computes blocks on a CPU, where it was proved for this model.
        patience: Seconds by class, in place of `PATIENCE_SECONDS`.
        on_batch: Told the tokens and the seconds of each forward.
        packed: Whether blocks share forwards; None decides by the model's device and dtype.

    Attributes:
        blocks_total: Blocks made.
        tokens_total: Their tokens.
        seconds_total: Time of forwards that succeeded.
        failures_total: Blocks that could not be encoded.
        splits_total: Batches that failed and were cut in halves.
        retries_total: Blocks that ran out of memory and were tried again in smaller chunks.
        keep_failures_total: Blocks that `keep` would not take.
    """

    def __init__(
        self,
        model: ServedModel,
        keep: Callable[[StoredBlock], None],
        *,
        max_queued_blocks: int,
        max_queued_tokens: int,
        max_unshipped_bytes: int,
        batch_tokens: int,
        native: NativeEncoder | None = None,
        patience: Mapping[Urgency, float] = PATIENCE_SECONDS,
        on_batch: Callable[[int, float], None] | None = None,
        packed: bool | None = None,
    ) -> None:
        self._keep = keep
        self._on_batch = on_batch
        self._shape = model.geometry.shape
        self._rate = EncodeRate()
        self._forward = Forward(model, native, self._on_newborn)
        self._batch_tokens = batch_tokens if (packs(model) if packed is None else packed) else 0
        self._max_unshipped_bytes = max_unshipped_bytes
        # Sum of `held_bytes` of all encodings.
        self._unshipped_bytes = 0
        self._queue: BatchQueue[Encoding] = BatchQueue(
            max_queued_blocks, max_queued_tokens, seconds=self._rate.seconds, patience=patience
        )
        self._open: dict[bytes, Encoding] = {}
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._log = logs.get("encoder")
        self.blocks_total = self.tokens_total = self.failures_total = 0
        self.splits_total = self.retries_total = self.keep_failures_total = 0
        self.seconds_total = 0.0

    @property
    def queued(self) -> int:
        """Blocks that are not encoded yet, those on the thread among them."""
        return len(self._open)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the thread."""
        return self._queue.tokens

    @property
    def unshipped_bytes(self) -> int:
        """Bytes of extents, made or being made, that requests still hold."""
        return self._unshipped_bytes

    def queue_depths(self) -> Mapping[Urgency, int]:
        """Blocks that wait for the thread, by class."""
        return self._queue.depths()

    def encode_seconds(self, tokens: int) -> float | None:
        """Time that encoding `tokens` tokens takes, as measured lately, without the queue; None before the first."""
        return self._rate.seconds(tokens)

    def request(
        self, key: bytes, token_ids: Sequence[int], *, store: bool, urgency: Urgency, tenant: str = ""
    ) -> tuple[Encoding, bool]:
        """Joins the encoding of a block, or queues it.

        Returns:
            The encoding, which the caller must `leave` once, and whether another request began it.

        Raises:
            DrystoneError: ENCODE_QUEUE_FULL, with a delay; DRAINING.
        """
        if self._forward.stopping:
            raise _draining()
        encoding = self._open.get(key)
        shared = encoding is not None
        if encoding is None:
            loop = asyncio.get_running_loop()
            encoding = Encoding(
                key=key,
                token_ids=tuple(token_ids),
                tokens=len(token_ids),
                urgency=urgency,
                begun=loop.create_future(),
                done=loop.create_future(),
                tenant=tenant,
            )
            self._queue.add(encoding)
            self._open[key] = encoding
        else:
            self._queue.raise_to(encoding, urgency)
        encoding.interested += 1
        encoding.store |= store
        if encoding.begun.done():
            self._hold(encoding)
        self._changed.set()
        return encoding, shared

    def leave(self, encoding: Encoding) -> None:
        """A request has shipped what it wanted, or gave up; an encoding that nobody wants is not begun."""
        if not encoding.interested:
            raise ValueError("an encoding is left once by each who joined it")
        encoding.interested -= 1
        if encoding.interested:
            return
        self._unshipped_bytes -= encoding.held_bytes
        encoding.held_bytes = 0
        if encoding.rank is not None:
            self._queue.remove(encoding)
            del self._open[encoding.key]
            encoding.cancel()
        self._changed.set()

    def forget(self, key: bytes) -> None:
        """A block was deleted: what is being encoded of it still serves those who wait, and is not kept."""
        encoding = self._open.get(key)
        if encoding is not None:
            encoding.store = False

    async def run(self) -> None:
        """Encodes until cancelled; what is then open fails, and the thread has ended when this returns."""
        try:
            while True:
                self._changed.clear()
                batch = self._next_batch()
                if batch:
                    await self._encode(batch)
                else:
                    await self._changed.wait()
        finally:
            self._forward.stopping = True
            for encoding in self._open.values():
                self._queue.remove(encoding)
                encoding.fail(_draining())
            self._open.clear()
            # A forward cannot be interrupted; it ends by itself, and the loop goes on meanwhile.
            await asyncio.to_thread(self._thread.shutdown)

    def _next_batch(self) -> list[Encoding]:
        """What the thread does next; nothing while extents that wait for slow decode workers leave no room."""
        head = self._queue.head
        if head is None:
            return []
        room = (self._max_unshipped_bytes - self._unshipped_bytes) // self._shape.token_bytes
        if head.tokens > room and self._unshipped_bytes:
            return []
        return self._queue.take(min(self._batch_tokens, room))

    async def _encode(self, batch: list[Encoding]) -> None:
        began = time.monotonic()
        for encoding in batch:
            encoding.queue_ms = (began - encoding.arrived) * 1e3
        try:
            outcome = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward.run, batch)
        except Exception as error:  # noqa: BLE001 - a defect may fail this batch, and not end the loop
            self._log.error("batch_defect", blocks=len(batch), exc_info=error)
            failure = f"a block could not be encoded: {error}"
            outcome = Outcome(made=[DrystoneError(Reason.BLOCK_UNAVAILABLE, failure) for _ in batch])
        self._count(outcome)
        milliseconds = (time.monotonic() - began) * 1e3
        for encoding, made in zip(batch, outcome.made, strict=True):
            encoding.encode_ms = milliseconds
            del self._open[encoding.key]
            if isinstance(made, DrystoneError):
                self.failures_total += 1
                encoding.fail(made)
            else:
                self._hand_over(encoding, made)

    def _count(self, outcome: Outcome) -> None:
        self.splits_total += outcome.splits
        self.retries_total += outcome.retries
        for tokens, seconds in outcome.forwards:
            self._rate.record(tokens, seconds)
            self.seconds_total += seconds
            if self._on_batch is not None:
                self._on_batch(tokens, seconds)

    def _hand_over(self, encoding: Encoding, block: StoredBlock) -> None:
        self.blocks_total += 1
        self.tokens_total += encoding.tokens
        if encoding.store:
            try:
                self._keep(block)
            except Exception as error:  # noqa: BLE001 - those who wait for the block get it all the same
                self.keep_failures_total += 1
                self._log.error("keep_failed", key=encoding.key.hex(), exc_info=error)
        self._hold(encoding)
        encoding.succeed(block)

    def _on_newborn(self, encoding: Encoding, newborn: Newborn | None) -> None:
        """On the thread."""
        encoding.done.get_loop().call_soon_threadsafe(self._begun, encoding, newborn)

    def _begun(self, encoding: Encoding, newborn: Newborn | None) -> None:
        if not encoding.done.done():
            encoding.begin(newborn)
            if newborn is not None:
                self._hold(encoding)

    def _hold(self, encoding: Encoding) -> None:
        """Its extent is there; it counts while somebody is interested."""
        if encoding.interested and not encoding.held_bytes:
            encoding.held_bytes = self._shape.extent_bytes(encoding.tokens)
            self._unshipped_bytes += encoding.held_bytes


def _draining() -> DrystoneError:
    return DrystoneError(Reason.DRAINING, "the prefill worker is stopping")
