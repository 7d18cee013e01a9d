"""Settings of a gateway."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from shared.settings import Addresses, ProcessSettings


class GatewaySettings(ProcessSettings):
    """Admits, plans and relays: `python -m gateway --decode-workers H:P,H:P --prefill-workers H:P --port 7700`."""

    model: str = Field(
        "default", description="Model whose tokenizer and template are used: folder, GGUF file, hub id or 'default'."
    )
    model_name: str = Field("", description="Name that clients ask for; empty takes the model's own.")
    decode_workers: Addresses = Field(default_factory=list, description="gRPC addresses, separated by commas.")
    prefill_workers: Addresses = Field(default_factory=list, description="gRPC addresses, separated by commas.")
    poll_seconds: float = Field(1.0, gt=0, description="Time between looks at each worker, in seconds.")
    default_timeout_seconds: float = Field(
        300.0, gt=0, description="Time of a request whose caller set no deadline, in seconds."
    )
    fetch_timeout_seconds: float = Field(
        60.0, gt=0, description="Time that one prefill worker has for the blocks of a request, in seconds."
    )
    fetch_attempts: int = Field(
        2, ge=0, description="Prefill workers tried for a block before the decode worker encodes it itself."
    )
    max_requests: int = Field(1024, ge=1, description="Requests served at once; more are refused.")
    max_documents: int = Field(1024, ge=1, description="Most documents, blocks or messages of a prompt.")
    max_document_bytes: int = Field(1 << 20, ge=1, description="Longest text of one document, block or message.")
    max_stop_strings: int = Field(64, ge=0, description="Most stop strings of a request.")
    warm_concurrency: int = Field(32, ge=1, description="Documents that are warmed at once, over all calls.")
    warm_timeout_seconds: float = Field(600.0, gt=0, description="Time of one document that is warmed, in seconds.")
    max_warm_documents: int = Field(10_000, ge=1, description="Most documents of one call of Warm.")
    share_blocks: bool = Field(
        default=False, description="Let all tenants use the same blocks. They then learn what others have sent."
    )
    tenant_secret: SecretStr = Field(
        SecretStr(""),
        description="Goes into the keys of named tenants' blocks; every gateway of a cluster needs the same one.",
    )
    template: str = Field("auto", description="Template when a request names none: auto, chat, tulu, card or plain.")
    bos: Literal["auto", "always", "never"] = Field("auto", description="Whether prompts begin with the BOS token.")
    block_attention_prefix: bool = Field(
        default=False, description="Begin BLOCK prompts with the text '[Block-Attention]'."
    )
    special_tokens_in_documents: bool = Field(
        default=False, description="Let text in documents become control tokens. Only for trusted documents."
    )
