"""Where ZeroMQ's frames are allocated: on a heap that keeps its pages, so that each is not faulted in again.

ZeroMQ takes memory for every frame of a chunk with malloc, and frees it when the chunk is in its place. By default
glibc gives such memory back to the kernel and asks for it again, at a page fault for every 4 KiB received: half of the
receiver's system time (docs/measurements.md, "Shipping"). What is kept instead is bounded by the credit given.
"""

from __future__ import annotations

import ctypes

from shared.kv.birth import CHUNK_BYTES

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Frames are taken from the heap; tensors of the model, which are larger, from the kernel.
_MMAP_BYTES = 4 * CHUNK_BYTES
# What a heap keeps at its end.
_TRIM_BYTES = 64 << 20
_OPTIONS = ((_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _TRIM_BYTES))


def keep_frames_on_heap() -> bool:
    """Sets the process's allocator; for a process's main, before its threads. False where it is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return all(mallopt(option, size) == 1 for option, size in _OPTIONS)
