"""Which way a pair's KV travels: ZeroMQ, or a process group beside it.

Groups are for two workers of one host: neither Gloo nor NCCL authenticates or encrypts, so they stay on the loopback
interface, and whatever leaves the host goes by ZeroMQ, where CURVE guards it.

"auto" means ZeroMQ (Unix-domain on one host, else TCP; `endpoints.py`). It does not take NCCL by itself while that has
not been proved between two GPUs: who wants it asks for it on both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from shared.internal.v1.transfer_pb2 import PairEnd
from shared.runtime import host_name

Setting = Literal["auto", "zmq", "gloo", "nccl"]
Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class End:
    """What one worker says of itself.

    Attributes:
        setting: Its `--kv-transport`.
        host: Name of its host; empty where it is not known.
        device: Where its extents lie: "cpu", or "cuda:" and the GPU's unique id.
        ordinal: Of that GPU, in this process; said to nobody.
    """

    setting: Setting
    host: str
    device: str
    ordinal: int = 0

    @property
    def on_gpu(self) -> bool:
        """True where its extents lie in GPU memory."""
        return self.device.startswith("cuda:")


def own_end(setting: Setting, device: str) -> End:
    """This worker's.

    Args:
        setting: Its `--kv-transport`.
        device: torch's name of it, such as "cpu" or "cuda:1".
    """
    if not device.startswith("cuda"):
        return End(setting, host_name(), "cpu")
    import torch

    ordinal = torch.device(device).index or 0
    return End(setting, host_name(), f"cuda:{torch.cuda.get_device_properties(ordinal).uuid}", ordinal)


def told(end: End) -> PairEnd:
    """As the other end hears of it."""
    return PairEnd(kv_transport=end.setting, host=end.host, device=end.device)


def heard(end: PairEnd) -> End:
    """What the other end said; a setting that this version does not know is no wish."""
    known = end.kv_transport in get_args(Setting)
    return End(cast("Setting", end.kv_transport) if known else "zmq", end.host, end.device)


# A worker that takes no part in groups.
ZEROMQ_ALONE = End("zmq", "", "cpu")


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
