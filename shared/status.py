"""Figures that processes report in `drystone status`: one registry. docs/status.md mirrors it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from drystone.v1.operations_pb2 import StatusValue

FIGURES: Mapping[str, str] = MappingProxyType(
    {
        "num_requests_running": "Requests admitted and not finished.",
        "num_requests_waiting": "Requests waiting for room.",
        "num_requests_waiting_for_blocks": "Requests admitted that wait for blocks to arrive.",
        "requests_total": "Requests taken since the start.",
        "requests_failed_total": "Requests that ended with an error since the start.",
        "pool_capacity_bytes": "KV bytes that the decode worker can hold.",
        "pool_used_bytes": "KV bytes in resident blocks, reserved extents and tails.",
        "pool_pinned_bytes": "KV bytes of blocks that running requests use.",
        "pool_longest_free_bytes": "Longest run of free KV memory: what fits without moving anything.",
        "pool_moved_bytes_total": "KV bytes moved together to make longer runs, since the start.",
        "kv_cache_usage_ratio": "Share of the pool that is used, from 0 to 1.",
        "blocks_resident": "Blocks resident on the decode worker.",
        "tail_segments_sealed": "Segments of earlier questions and answers that follow-ups may begin with.",
        "reservations_open": "Extents reserved for blocks that have not arrived.",
        "evictions_total": "Blocks evicted since the start.",
        "prefix_cache_queries_total": "Prompt tokens that admitted requests asked for.",
        "prefix_cache_hits_total": "Prompt tokens among them whose KV was there or on its way for another request.",
        "prompt_tokens_total": "Prompt tokens of admitted requests since the start.",
        "generation_tokens_total": "Tokens generated since the start.",
        "steps_total": "Steps run since the start.",
        "integrity_failures_total": "Times that an idle worker found its memory not to tile: a defect of Drystone.",
        "store_capacity_bytes": "KV bytes that the prefill worker keeps in memory.",
        "store_used_bytes": "KV bytes that it keeps now.",
        "blocks_stored": "Blocks that it keeps now.",
        "encode_queue_blocks": "Blocks waiting to be encoded.",
        "blocks_encoded_total": "Blocks encoded since the start.",
        "tokens_encoded_total": "Tokens encoded since the start.",
        "encode_seconds_total": "Seconds spent encoding since the start.",
        "shipped_bytes_total": "KV bytes shipped since the start.",
        "received_bytes_total": "KV bytes received and committed since the start.",
        "chunks_refused_total": "Chunks refused since the start.",
        "chunks_resent_total": "Chunks sent again since the start.",
    }
)


def status_values(**figures: float) -> list[StatusValue]:
    """Figures as messages; a name that is not registered is a KeyError, so that none goes undocumented."""
    for name in figures:
        FIGURES[name]
    return [StatusValue(name=name, value=value) for name, value in figures.items()]
