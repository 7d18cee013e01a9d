"""Names of the objects that hold blocks."""

from __future__ import annotations

from dataclasses import dataclass

from prefill_worker.tiers.block_file import FileIdentity
from shared.kv.keys import KEY_BYTES

BLOCKS = "blocks"
QUARANTINE = "quarantine"
SUFFIX = ".safetensors"
_FINGERPRINT_DIGITS = 16
_FAN_DIGITS = 2


@dataclass(frozen=True, slots=True)
class ObjectNames:
    """Names within one store; blocks of one model have one prefix in common.

    blocks/5f3c6a0e91b2d874-bfloat16-v1/a7/a7c1...09.safetensors
           └ model fingerprint ┘ dtype layout └ fan-out, key
    quarantine/5f3c6a0e91b2d874-bfloat16-v1/a7c1...09.safetensors
    """

    prefix: str

    @classmethod
    def of(cls, identity: FileIdentity) -> ObjectNames:
        """Names of one model's blocks."""
        model = identity.model_fingerprint.hex()[:_FINGERPRINT_DIGITS]
        return cls(f"{model}-{identity.shape.dtype}-v{identity.layout_version}")

    @property
    def blocks(self) -> str:
        """Prefix of all blocks of the model."""
        return f"{BLOCKS}/{self.prefix}"

    def block(self, key: bytes) -> str:
        """Name of one block."""
        digits = key.hex()
        return f"{self.blocks}/{digits[:_FAN_DIGITS]}/{digits}{SUFFIX}"

    def key(self, name: str) -> bytes | None:
        """The block that this name is of; None when it is no name of a block of this model."""
        digits = name.rpartition("/")[2].removesuffix(SUFFIX)
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            return None
        return key if len(key) == KEY_BYTES and self.block(key) == name else None

    def quarantined(self, key: bytes) -> str:
        """Name under which a bad file of this block is put aside."""
        return f"{QUARANTINE}/{self.prefix}/{key.hex()}{SUFFIX}"
