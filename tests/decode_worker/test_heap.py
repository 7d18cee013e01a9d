"""Memory of frames stays with the process: what is freed is had again without a page fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FAULTS = """
import ctypes, resource, threading
from decode_worker.receiving.heap import keep_frames_on_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
SIZE, TIMES, AT_ONCE = 2 << 20, 50, 4

def frames():
    for _ in range(TIMES):
        held = [libc.malloc(SIZE) for _ in range(AT_ONCE)]
        for one in held:
            libc.memset(one, 1, SIZE)
        for one in held:
            libc.free(one)

if {keep}:
    keep_frames_on_heap() or exit("not glibc")
else:
    libc.mallopt(-3, 128 << 10)  # glibc as it starts; it learns by itself, and slowly
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=frames)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_PAGES_AT_ONCE = (4 * 2 << 20) // 4096


def _faults(*, keep: bool) -> int:
    code = _FAULTS.replace("{keep}", str(keep))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if "not glibc" in done.stderr:
        pytest.skip("the C library is not glibc: its allocator is left as it is")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_frames_are_faulted_in_once() -> None:
    assert _faults(keep=True) < 2 * _PAGES_AT_ONCE
    assert _faults(keep=False) > 5 * _PAGES_AT_ONCE
