"""Figures that processes report in `drystone status`: one registry. docs/status.md mirrors it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from drystone.v1.operations_pb2 import StatusValue

# Of each place where a prefill worker keeps blocks.
_OF_EVERY_TIER = {
    "capacity_bytes": "Bytes that {tier} may take; 0 is no limit of Drystone's own.",
    "used_bytes": "Bytes of blocks in {tier}.",
    "blocks": "Blocks in {tier}.",
    "hits_total": "Blocks read from {tier}.",
    "misses_total": "Blocks looked for in {tier} and not found.",
    "evictions_total": "Blocks that went from {tier} to make room.",
}
_OF_FILES = {
    "read_bytes_total": "KV bytes read from {tier}.",
    "written_bytes_total": "KV bytes written to {tier}.",
    "corruptions_total": "Bad files found in {tier}; each was set aside and its block encoded again.",
    "failures_total": "Reads and writes of {tier} that failed or took too long.",
    "writes_dropped_total": "Blocks not written to {tier} at first, because too many waited or it was resting.",
    "expirations_total": "Blocks that went from {tier} because nobody had used them for their time to live.",
    "off": "1 while reading from {tier} is slower than encoding, as measured, and therefore not done.",
    "resting": "1 while {tier} has failed too often and is left alone for a while.",
}
_TIER_FIGURES = {
    f"{name}_{figure}": text.format(tier=tier)
    for name, tier, figures in (
        ("ram", "memory", _OF_EVERY_TIER),
        ("disk", "the disk", _OF_EVERY_TIER | _OF_FILES),
        ("object", "the object store", _OF_EVERY_TIER | _OF_FILES),
    )
    for figure, text in figures.items()
}

FIGURES: Mapping[str, str] = MappingProxyType(
    {
        "num_requests_running": "Requests admitted and not finished.",
        "num_requests_waiting": "Requests waiting for room.",
        "num_requests_waiting_for_blocks": "Requests admitted that wait for blocks to arrive.",
        "requests_total": "Requests taken since the start.",
        "requests_failed_total": "Requests that ended with an error since the start.",
        "documents_warmed_total": "Documents that calls of Warm have ended with, since the start.",
        "documents_failed_total": "Documents among them that could not be warmed.",
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
        "encode_queue_blocks": "Blocks that are not encoded yet, those in a forward among them.",
        "encode_queue_tokens": "Tokens waiting to be encoded.",
        "encode_queue_warming_blocks": "Blocks of warming that wait to be encoded.",
        "encode_failures_total": "Blocks that could not be encoded.",
        "encode_splits_total": "Forwards that failed and were tried again in halves.",
        "unshipped_bytes": "KV bytes of encoded blocks that requests still hold.",
        "unwritten_bytes": "KV bytes that wait to be written to disk and object store.",
        "records": "Records of warmed documents.",
        "records_damaged_total": "Records that did not hold what was written, and were dropped.",
        "record_failures_total": "Operations on records that failed or took too long.",
        "blocks_encoded_total": "Blocks encoded since the start.",
        "tokens_encoded_total": "Tokens encoded since the start.",
        "encode_seconds_total": "Seconds spent encoding since the start.",
        **_TIER_FIGURES,
        "shipped_bytes_total": "KV bytes shipped since the start.",
        "received_bytes_total": "KV bytes received and committed since the start.",
        "chunks_refused_total": "Chunks refused since the start.",
        "chunks_resent_total": "Chunks sent again since the start.",
        "kv_pairs": "Pairs of this worker with others that KV travels over.",
        "kv_outstanding_bytes": "KV bytes sent that receivers have not dealt with yet.",
        "transport_fallbacks_total": "Pairs that fell back from a process group to ZeroMQ.",
        "handshakes_failed_total": "Links to decode workers that failed before a word was said: a wrong key, or none.",
        "connections_denied_total": "Senders that were not let in: no key, or a wrong one.",
    }
)


def status_values(**figures: float) -> list[StatusValue]:
    """Figures as messages; a name that is not registered is a KeyError, so that none goes undocumented."""
    for name in figures:
        FIGURES[name]
    return [StatusValue(name=name, value=value) for name, value in figures.items()]
