"""Settings of a decode worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from shared.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """Holds block KV, runs question blocks, generates: `python -m decode_worker --port 7702 --kv-port 7703`."""

    pool_bytes: int | None = Field(
        None, ge=1 << 20, description="KV memory, in bytes; default pool_share of the memory that is free."
    )
    pool_share: float = Field(
        0.5, gt=0, le=1, description="Share of the free memory that KV takes where pool_bytes is not set."
    )
    eviction: Literal["lru", "lfu"] = Field(
        "lru", description="Which idle block goes first: the least recently used, or the least frequently used."
    )
    max_samples: int = Field(256, ge=1, description="Samples that generate at once; further requests wait.")
    step_tokens: int = Field(512, ge=2, description="Most tokens of one step; above max_samples.")
    mixed_step_tokens: int = Field(
        128, ge=1, description="Most question tokens of a step in which others wait for their next token."
    )
    kv_host: str = Field("127.0.0.1", description="Address that KV is received on, as prefill workers reach it.")
    kv_port: int = Field(0, ge=0, le=65535, description="Port that KV is received on; 0 takes a free one.")
    kv_receive_bytes: int = Field(
        256 << 20, ge=4 << 20, description="Bytes of KV that all prefill workers together may have on the way to it."
    )
    max_waiting: int = Field(256, ge=0, description="Requests that may wait for room before others are refused.")
    attention: Literal["auto", "flash", "native", "varlen", "triton"] = Field(
        "auto", description="Backend of the decode step's attention; auto takes the fastest that this machine can run."
    )
    fetch_stall_seconds: float = Field(
        20.0, gt=0, description="Time without progress after which a block's fetch is driven anew, in seconds."
    )
    default_timeout_seconds: float = Field(
        300.0, gt=0, description="Time of a request whose caller set no deadline, in seconds."
    )

    @model_validator(mode="after")
    def _every_sample_has_a_row(self) -> DecodeSettings:
        if self.step_tokens <= self.max_samples:
            raise ValueError(f"step_tokens: {self.step_tokens} must be above max_samples, {self.max_samples}")
        return self

    @field_validator("kv_host")
    @classmethod
    def _one_address(cls, host: str) -> str:
        """Refuses wildcards: the address is told to prefill workers as it is."""
        if host in ("", "*", "0.0.0.0", "::", "[::]"):  # noqa: S104 - refused, not bound
            raise ValueError("name one address that prefill workers reach, not a wildcard")
        return host
