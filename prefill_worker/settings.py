"""Settings of a prefill worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from shared.settings import WorkerSettings


def _pairs(given: object) -> object:
    """`NAME=VALUE,NAME=VALUE` as a mapping."""
    if not isinstance(given, str):
        return given
    parts = [part.partition("=") for part in given.split(",") if part.strip()]
    for name, sign, _ in parts:
        if not (name.strip() and sign):
            raise ValueError("give NAME=VALUE, separated by commas")
    return {name.strip(): value.strip() for name, _, value in parts}


Options = Annotated[dict[str, str], NoDecode, BeforeValidator(_pairs)]


class PrefillSettings(WorkerSettings):
    """Encodes blocks, keeps them, ships them: `python -m prefill_worker --port 7701 --disk-path /var/lib/drystone`."""

    ram_bytes: int = Field(1 << 30, ge=0, description="Memory for encoded blocks, in bytes.")
    disk_path: Path | None = Field(
        None, description="Folder for encoded blocks and records, of this worker alone; none keeps nothing on disk."
    )
    disk_bytes: int = Field(10 << 30, ge=0, description="Bytes of blocks in that folder.")
    disk_ttl_seconds: float | None = Field(None, gt=0, description="Blocks there go when not used for so long.")
    object_url: str = Field(
        "", description="Object store that prefill workers share: s3://bucket/prefix, gs://..., az://..., or a folder."
    )
    object_options: Options = Field(
        default_factory=dict,
        repr=False,
        description="Options of that store, as NAME=VALUE,NAME=VALUE: region, endpoint, allow_http and others.",
    )
    object_bytes: int = Field(
        0, ge=0, description="Bytes of blocks there; 0 leaves the limit to the store's own rules."
    )
    object_ttl_seconds: float | None = Field(None, gt=0, description="Blocks there go when not used for so long.")
    object_refresh_seconds: float = Field(
        300.0, gt=0, description="Time between listings of what other workers have written there."
    )
    write_queue_bytes: int = Field(
        256 << 20, ge=0, description="Bytes of blocks that may wait to be written to disk and object store."
    )
    sweep_seconds: float = Field(30.0, gt=0, description="Time between looks for what has expired.")
    max_records: int = Field(1_000_000, ge=1, description="Most records of warmed documents.")
    max_queued_blocks: int = Field(
        4096, ge=1, description="Blocks that may wait to be encoded; warming may take half of these places."
    )
    max_queued_tokens: int = Field(1 << 20, ge=1, description="Tokens that may wait to be encoded, likewise.")
    batch_tokens: int = Field(8192, ge=1, description="Rows of one forward where blocks are packed, which is on GPUs.")
    max_unshipped_bytes: int = Field(
        1 << 30, ge=1 << 20, description="Bytes of encoded blocks that may wait to be shipped before encoding pauses."
    )
    native_encoder: bool = Field(
        default=True, description="Encode by the CPU kernels where they can be built and are proved for the model."
    )
    ship_timeout_seconds: float = Field(30.0, gt=0, description="Longest time without progress of a transfer.")
    default_timeout_seconds: float = Field(
        300.0, gt=0, description="Time of a request whose caller set no deadline, in seconds."
    )
