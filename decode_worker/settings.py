"""Settings of a decode worker."""

from __future__ import annotations

from pydantic import Field

from shared.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """Holds block KV, runs question blocks, generates: `python -m decode_worker --port 7702 --kv-port 7703`."""

    pool_bytes: int = Field(2 << 30, ge=1 << 20, description="KV memory, in bytes.")
    kv_host: str = Field("127.0.0.1", description="Address that KV is received on; one address, never '*'.")
    kv_port: int = Field(0, ge=0, le=65535, description="Port that KV is received on; 0 takes a free one.")
    max_waiting: int = Field(256, ge=0, description="Requests that may wait for room before others are refused.")
    default_timeout_seconds: float = Field(
        300.0, gt=0, description="Time of a request whose caller set no deadline, in seconds."
    )
