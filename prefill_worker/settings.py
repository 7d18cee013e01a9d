"""Settings of a prefill worker."""

from __future__ import annotations

from pydantic import Field

from shared.settings import WorkerSettings


class PrefillSettings(WorkerSettings):
    """Encodes blocks, keeps them, ships them: `python -m prefill_worker --port 7701`."""

    store_bytes: int = Field(1 << 30, ge=0, description="Memory for encoded blocks, in bytes.")
    max_queued_blocks: int = Field(4096, ge=1, description="Blocks that may wait to be encoded.")
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
