"""Settings of a decode worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from shared.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """Holds block KV, runs question blocks, generates: `python -m decode_worker --port 7702 --kv-port 7703`."""

    pool_bytes: int = Field(2 << 30, ge=1 << 20, description="KV memory, in bytes.")
    kv_host: str = Field("127.0.0.1", description="Address that KV is received on, as prefill workers reach it.")
    kv_port: int = Field(0, ge=0, le=65535, description="Port that KV is received on; 0 takes a free one.")
    max_waiting: int = Field(256, ge=0, description="Requests that may wait for room before others are refused.")
    attention: Literal["auto", "flash", "native"] = Field(
        "auto", description="Backend of the decode step's attention; auto takes the fastest that this machine can run."
    )
    fetch_stall_seconds: float = Field(
        20.0, gt=0, description="Time without progress after which a block's fetch is driven anew, in seconds."
    )
    default_timeout_seconds: float = Field(
        300.0, gt=0, description="Time of a request whose caller set no deadline, in seconds."
    )

    @field_validator("kv_host")
    @classmethod
    def _one_address(cls, host: str) -> str:
        """Refuses wildcards: the address is told to prefill workers as it is."""
        if host in ("", "*", "0.0.0.0", "::", "[::]"):  # noqa: S104 - refused, not bound
            raise ValueError("name one address that prefill workers reach, not a wildcard")
        return host
