"""Which way a pair's KV travels: ZeroMQ, or a process group beside it.

Groups are for two workers of one host: neither Gloo nor NCCL authenticates or encrypts, so they stay on the loopback
interface, and whatever leaves the host goes by ZeroMQ, where CURVE guards it.

"auto" means ZeroMQ (Unix-domain on one host, else TCP; `endpoints.py`). It does not take NCCL by itself while that has
not been proved between two GPUs: who wants it asks for it on both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Setting = Literal["auto", "zmq", "gloo", "nccl"]
Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class End:
    """What one worker says of itself.

    Attributes:
        setting: Its `--kv-transport`.
        host: Name of its host; empty where it is not known.
        device: Where its extents lie: "cpu", or "cuda:" and the GPU's unique id.
    """

    setting: Setting
    host: str
    device: str

    @property
    def on_gpu(self) -> bool:
        """True where its extents lie in GPU memory."""
        return self.device.startswith("cuda:")


def wanted(end: End) -> Backend | None:
    """The group that a worker asks its pairs for; None for ZeroMQ alone."""
    if end.setting == "gloo":
        return "gloo"
    return "nccl" if end.setting == "nccl" and end.on_gpu else None


def chosen(sender: End, receiver: End) -> Backend | None:
    """The group of a pair; None for ZeroMQ alone. NCCL refuses two ranks on one GPU."""
    backend = wanted(sender)
    if backend is None or backend != wanted(receiver):
        return None
    if not sender.host or sender.host != receiver.host:
        return None
    if backend == "nccl" and sender.device == receiver.device:
        return None
    return backend
