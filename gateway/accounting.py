"""What a request cost: statistics put together from all who took part."""

from __future__ import annotations

import time

from drystone.v1 import generation_pb2 as v1
from drystone.v1.statistics_pb2 import BlockRole, BlockSource, BlockStats, RoutingStats, Timings, Usage
from gateway.fetcher import Fetcher
from gateway.ticket import Ticket
from shared.internal.v1.common_pb2 import ShipSource
from shared.internal.v1.decode_pb2 import Admitted, Arrival, Ended, SampleEnded
from shared.metrics import Metrics

# Place of what lies in the object store, which belongs to no worker.
OBJECT_STORE = "object-store"
SOURCES = {
    ShipSource.SHIP_SOURCE_RAM: BlockSource.BLOCK_SOURCE_PREFILL_RAM,
    ShipSource.SHIP_SOURCE_DISK: BlockSource.BLOCK_SOURCE_PREFILL_DISK,
    ShipSource.SHIP_SOURCE_OBJECT_STORE: BlockSource.BLOCK_SOURCE_OBJECT_STORE,
    ShipSource.SHIP_SOURCE_ENCODED: BlockSource.BLOCK_SOURCE_ENCODED,
    # Another request's encoding: this one computed nothing for it.
    ShipSource.SHIP_SOURCE_SHARED_ENCODE: BlockSource.BLOCK_SOURCE_PREFILL_RAM,
}
_COMPUTED = frozenset({BlockSource.BLOCK_SOURCE_ENCODED, BlockSource.BLOCK_SOURCE_ENCODED_ON_DECODE})


def planned_blocks(ticket: Ticket) -> list[BlockStats]:
    """The prompt's blocks in order, with key, role, tokens and offset; the question block last, without a key."""
    stats, offset = [], 0
    for block, ref in zip(ticket.plan.blocks, ticket.refs, strict=True):
        entry = BlockStats(
            block_key=ref.key.hex(), role=BlockRole.ValueType(block.role), tokens=len(block.token_ids), offset=offset
        )
        if block.document_index is not None:
            entry.document_index = block.document_index
        stats.append(entry)
        offset += len(block.token_ids)
    question = BlockRole.BLOCK_ROLE_QUESTION
    return [*stats, BlockStats(role=question, tokens=len(ticket.plan.question_ids), offset=offset)]


class Account:
    """Collects one request's figures as its events pass by."""

    def __init__(self, ticket: Ticket, routing: RoutingStats, metrics: Metrics) -> None:
        self._ticket = ticket
        self._routing = routing
        self._metrics = metrics
        self._first_token = 0.0
        # When each sample's last token left, by sample index.
        self._last_token: dict[int, float] = {}
        self._completion_tokens = 0
        self.admitted = Admitted()
        self.ended = Ended()

    def token_sent(self, sample_index: int) -> None:
        """A token of a sample leaves for the client.

        The first of any sample counts for the time to first token, the others for their own sample's latency.
        """
        now = time.monotonic()
        if sample_index in self._last_token:
            self._metrics.observe("inter_token_latency_seconds", now - self._last_token[sample_index])
        elif not self._last_token:
            self._first_token = now
            self._metrics.observe("time_to_first_token_seconds", now - self._ticket.arrived)
        self._last_token[sample_index] = now

    def sample_finished(self, ended: SampleEnded) -> None:
        """A sample has ended; its tokens count."""
        self._completion_tokens += ended.completion_tokens

    def completed(self, fetcher: Fetcher) -> v1.Completed:
        """The stream's last event."""
        blocks = planned_blocks(self._ticket)
        for stats, arrival in zip(blocks[:-1], self.ended.arrivals, strict=True):
            _fill(stats, arrival, fetcher)
        self._routing.fetch_retries = fetcher.retries
        return v1.Completed(usage=self._usage(blocks), timings=self._timings(), blocks=blocks, routing=self._routing)

    def _usage(self, blocks: list[BlockStats]) -> Usage:
        context = blocks[:-1]
        computed = [stats for stats in context if stats.source in _COMPUTED]
        reused = [stats for stats in context if stats.source not in _COMPUTED]
        return Usage(
            prompt_tokens=self._ticket.plan.prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(stats.tokens for stats in reused) + self.admitted.tail_tokens_reused,
            encoded_tokens=sum(stats.tokens for stats in computed),
            shipped_bytes=sum(stats.shipped_bytes for stats in context),
            blocks_reused=len(reused),
            blocks_encoded=len(computed),
        )

    def _timings(self) -> Timings:
        ticket, now = self._ticket, time.monotonic()
        first = self._first_token or now
        return Timings(
            plan_ms=(ticket.planned - ticket.arrived) * 1e3,
            queue_ms=self.admitted.queue_ms,
            fetch_ms=self.ended.fetch_ms,
            first_step_ms=self.ended.first_step_ms,
            ttft_ms=(first - ticket.arrived) * 1e3,
            total_ms=(now - ticket.arrived) * 1e3,
        )


def _fill(stats: BlockStats, arrival: Arrival, fetcher: Fetcher) -> None:
    stats.source, stats.shipped_bytes = arrival.source, arrival.shipped_bytes
    stats.ship_ms, stats.encode_ms = (arrival.fetch_ms if arrival.shipped_bytes else 0.0), arrival.encode_ms
    record = fetcher.records.get(bytes.fromhex(stats.block_key))
    if record is None or arrival.source == BlockSource.BLOCK_SOURCE_RESIDENT:
        return
    stats.failed_attempts.extend(record.failed_attempts)
    if arrival.source == BlockSource.BLOCK_SOURCE_UNSPECIFIED and record.done is not None:
        stats.source = SOURCES.get(record.done.source, BlockSource.BLOCK_SOURCE_UNSPECIFIED)
        stats.encode_ms, stats.ship_ms = record.done.encode_ms, record.done.ship_ms
        stats.worker_id = record.worker_id
