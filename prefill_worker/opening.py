"""A prefill worker's places, made of its settings: tiers, records, and what they count.

<disk-path>/                      <object-url>/
├── .lock                         ├── blocks/…       shared by all workers
├── blocks/…                      ├── quarantine/…
├── quarantine/…                  └── records/…
└── records-….sqlite
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefill_worker.records.mirror import Mirror
from prefill_worker.records.records import Records
from prefill_worker.settings import PrefillSettings
from prefill_worker.tiers.block_file import FileIdentity
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.cost import EncodeCost
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.locations import open_location
from prefill_worker.tiers.object_tier import ObjectTier
from prefill_worker.tiers.pace import Pace
from prefill_worker.tiers.ram import RamTier
from shared.engine.served_model import ServedModel
from shared.internal.v1.common_pb2 import ShipSource
from shared.metrics import Metrics

if TYPE_CHECKING:
    from obstore.store import ObjectStore


@dataclass(frozen=True, slots=True)
class Places:
    """Stores that settings name, opened before a model is loaded so that a wrong one is told at once.

    Raises:
        ValueError: One cannot be used; the message names the setting.
    """

    disk: ObjectStore | None
    bucket: ObjectStore | None
    folder: Path | None

    @classmethod
    def of(cls, settings: PrefillSettings) -> Places:
        """Opens them; nothing remote is asked yet."""
        path, url = settings.disk_path, settings.object_url
        if url and "://" not in url and not Path(url).is_absolute():
            raise ValueError(f"--object-url: {url} is neither a URL (s3://bucket/prefix) nor a folder's absolute path")
        return cls(
            disk=None if path is None else open_location(str(path), setting="--disk-path"),
            bucket=open_location(url, settings.object_options, setting="--object-url") if url else None,
            folder=path,
        )


class Opening:
    """Makes the parts.

    Args:
        settings: Budgets and times.
        places: Where blocks and records go.
        model: Whose blocks they are.
        encode_seconds: Time that encoding so many tokens takes, as measured.
        metrics: Told the seconds of reads and writes.
    """

    def __init__(
        self,
        settings: PrefillSettings,
        places: Places,
        model: ServedModel,
        encode_seconds: Callable[[int], float | None],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._places = places
        self._keys = model.key_space()
        self._shape = model.geometry.shape
        self._cost = EncodeCost.of(model)
        self._encode_seconds = encode_seconds
        self._metrics = metrics

    def store(self) -> BlockStore:
        """Memory, then disk, then the object store, as far as there are any."""
        settings, lower = self._settings, list[ObjectTier]()

        def pinned(key: bytes) -> bool:
            return store.pinned(key)

        if self._places.disk is not None:
            disk = Ledger(settings.disk_bytes, self._cost, ttl_seconds=settings.disk_ttl_seconds)
            lower.append(self._tier("disk", ShipSource.SHIP_SOURCE_DISK, self._places.disk, disk, pinned, shared=False))
        if self._places.bucket is not None:
            budget = settings.object_bytes or None
            bucket = Ledger(budget, self._cost, ttl_seconds=settings.object_ttl_seconds)
            lower.append(
                self._tier(
                    "object", ShipSource.SHIP_SOURCE_OBJECT_STORE, self._places.bucket, bucket, pinned, shared=True
                )
            )
        ram = RamTier(Ledger(settings.ram_bytes, self._cost))
        store = BlockStore(
            ram, lower, write_queue_bytes=settings.write_queue_bytes, sweep_seconds=settings.sweep_seconds
        )
        return store

    def records(self) -> Records:
        """Records on the disk's folder or in memory, mirrored where there is an object store."""
        bucket = self._places.bucket
        return Records(
            self._places.folder,
            None if bucket is None else Mirror(bucket, self._keys),
            key_space=self._keys,
            max_records=self._settings.max_records,
        )

    def _tier(
        self,
        name: str,
        source: ShipSource.ValueType,
        place: ObjectStore,
        ledger: Ledger,
        pinned: Callable[[bytes], bool],
        *,
        shared: bool,
    ) -> ObjectTier:
        tier = ObjectTier(
            name,
            source,
            place,
            FileIdentity.of(self._keys, self._shape),
            ledger,
            Pace(self._shape.token_bytes, self._encode_seconds),
            pinned=pinned,
            shared=shared,
            refresh_seconds=self._settings.object_refresh_seconds,
            setting="--object-url" if shared else "--disk-path",
        )
        tier.meter.on_read = lambda seconds: self._metrics.observe(f"{name}_read_seconds", seconds)
        tier.meter.on_write = lambda seconds: self._metrics.observe(f"{name}_write_seconds", seconds)
        return tier
