"""The one layout of a block's KV (design §4).

An extent of n tokens is contiguous, `[layers, n, 2, kv_heads, head_dim]`:

    layer 0                                   layer 1
    ┌ token 0 ┐┌ token 1 ┐      ┌ token n-1 ┐ ┌ token 0 ┐
    │ K0 │ V0 ││ K1 │ V1 │ ...  │ Kn-1│Vn-1 │ │ K0 │ V0 │ ...
    └─────────┘└─────────┘      └───────────┘ └─────────┘
      record     record

A **record** is one token of one layer, `[2, kv_heads, head_dim]`. Layers are outermost, so that a
group of layers is one run of bytes; K and V rows start at equal strides, which varlen kernels need.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

LAYOUT_VERSION = 1
ITEM_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape of one token's KV in a model; equal on all workers that exchange blocks."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def record_elements(self) -> int:
        """Elements of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def record_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.record_elements * ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.record_bytes

    def extent_records(self, tokens: int) -> int:
        """Records of an extent of `tokens` tokens."""
        return self.layers * tokens

    def extent_bytes(self, tokens: int) -> int:
        """Bytes of an extent of `tokens` tokens."""
        return self.token_bytes * tokens
