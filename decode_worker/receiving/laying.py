"""Bytes of a chunk into its place in an extent: the one copy of KV bytes on this side, and the sum over what landed.

On a CPU, copy and checksum take turns over pieces that stay in the core's cache, so that the sum reads no memory a
second time; the sum is over the extent and not over the frame. On a GPU the frame is summed, for xxh3 cannot run there,
and then copied; what NCCL brings is summed on the device.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash

_PIECE_BYTES = 256 << 10


def lay(extent: torch.Tensor, offset: int, data: memoryview, identity: bytes) -> int:
    """Copies `data` to `extent[offset:]` and returns its xxh3-64 with `identity` before it.

    Args:
        extent: uint8 [bytes], the memory of a reserved extent; nobody else writes it meanwhile.
        offset: Of the first byte.
        data: A frame's bytes; they fit.
        identity: What the checksum covers before the bytes (`chunk_identity`).
    """
    digest = xxhash.xxh3_64(identity)
    landed = extent[offset : offset + len(data)]
    if landed.device.type != "cpu":
        digest.update(data)
        # Whoever sets the chunk down as taken must know that it is there.
        landed.copy_(torch.frombuffer(data, dtype=torch.uint8))
        torch.cuda.synchronize(landed.device)
        return digest.intdigest()
    source, target = np.frombuffer(data, dtype=np.uint8), landed.numpy()
    for start in range(0, len(data), _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        np.copyto(piece, source[start : start + _PIECE_BYTES])
        digest.update(piece)  # type: ignore[arg-type] # arrays are buffers
    return digest.intdigest()
