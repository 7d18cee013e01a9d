"""A prefill worker's figures for the status registry."""

from __future__ import annotations

from prefill_worker.batch_queue import Urgency
from prefill_worker.encoder import Encoder
from prefill_worker.holdings import Holdings
from prefill_worker.tiers.object_tier import ObjectTier
from prefill_worker.tiers.tier import Tier
from prefill_worker.transfer.shipper import Shipper

# Bytes of a tier without a budget of its own.
_UNBOUNDED = 0


def figures(holdings: Holdings, encoder: Encoder, shipper: Shipper) -> dict[str, float]:
    """Every figure, by its name in `shared.status.FIGURES`."""
    records = holdings.records
    values: dict[str, float] = {
        "encode_queue_blocks": encoder.queued,
        "encode_queue_tokens": encoder.queued_tokens,
        "encode_queue_warming_blocks": encoder.queue_depths().get(Urgency.WARMING, 0),
        "blocks_encoded_total": encoder.blocks_total,
        "tokens_encoded_total": encoder.tokens_total,
        "encode_seconds_total": encoder.seconds_total,
        "encode_failures_total": encoder.failures_total,
        "encode_splits_total": encoder.splits_total,
        "unshipped_bytes": encoder.unshipped_bytes,
        "shipped_bytes_total": shipper.shipped_bytes,
        "chunks_resent_total": shipper.resent_total,
        "kv_pairs": len(shipper.links()),
        "kv_outstanding_bytes": sum(link.outstanding_bytes for link in shipper.links()),
        "handshakes_failed_total": shipper.handshakes_failed,
        "transport_fallbacks_total": shipper.fallbacks.total(),
        "unwritten_bytes": holdings.store.pending_bytes,
        "records": len(records),
        "records_damaged_total": records.figures.damaged_rows + records.figures.damaged_objects,
        "record_failures_total": (
            records.figures.table_failures + records.figures.mirror_failures + records.figures.not_expired
        ),
    }
    for tier in holdings.store.tiers:
        values.update(_of_tier(tier))
    return values


def _of_tier(tier: Tier) -> dict[str, float]:
    meter, ledger = tier.meter, tier.ledger
    values = {
        "capacity_bytes": ledger.budget_bytes or _UNBOUNDED,
        "used_bytes": ledger.used_bytes,
        "blocks": len(ledger),
        "hits_total": meter.hits,
        "misses_total": meter.misses,
        "evictions_total": meter.evictions,
    }
    if isinstance(tier, ObjectTier):
        values |= {
            "read_bytes_total": meter.read_bytes,
            "written_bytes_total": meter.written_bytes,
            "corruptions_total": meter.corruptions,
            "failures_total": meter.failures + meter.write_failures,
            "writes_dropped_total": meter.writes_dropped,
            "expirations_total": meter.expirations,
            "off": tier.off,
            "resting": tier.resting,
        }
    return {f"{tier.name}_{name}": float(value) for name, value in values.items()}
