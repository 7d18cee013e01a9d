"""What must be equal before KV may pass, and the name of the field that is not."""

from __future__ import annotations

from shared.engine.served_model import ServedModel
from shared.internal.v1.common_pb2 import Compatibility
from shared.kv.layout import LAYOUT_VERSION
from shared.version import PROTOCOL_VERSION


def compatibility_of(model: ServedModel) -> Compatibility:
    """What this worker's KV is."""
    shape = model.geometry.shape
    return Compatibility(
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=model.fingerprint,
        dtype=shape.dtype,
        layout_version=LAYOUT_VERSION,
        rope_regime=model.geometry.rope_regime(),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )


def difference(ours: Compatibility, theirs: Compatibility) -> tuple[str, str] | None:
    """Name of the first field that differs and a sentence about it; None when nothing does."""
    for field in Compatibility.DESCRIPTOR.fields:
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            return field.name, f"{field.name} differs: receiver has {_shown(mine)}, sender has {_shown(other)}"
    return None


def _shown(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else repr(value)
