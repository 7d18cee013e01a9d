"""What a cluster's processes say of themselves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PairStatus:
    """One end of a pair of workers that KV travels between, as that end sees it; counts begin with the pair.

    Attributes:
        peer: Id of the worker at the other end.
        address: Where KV travels to; empty where a receiver does not know its sender's.
        direction: "send": to the peer; "receive": from it.
        transport: "zmq-tcp", "zmq-ipc", "nccl" or "gloo".
        curve: True where CURVE encrypts and authenticates it.
        state: "greeting", "open", "idle" or "broken".
        bytes_total: KV bytes sent, those sent again among them; of a receiver, those taken.
        chunks_total: Chunks, counted likewise.
        resent_total: Chunks sent again; senders only.
        refused_total: Chunks refused; receivers only.
        outstanding_bytes: Sent, and not dealt with by the receiver yet.
        credit_free_bytes: May be sent now.
        credit_wait_seconds_total: Time without credit for a chunk that was ready; senders only.
        bandwidth_bytes_per_second: While chunks were on their way, recent ones counting more; senders only.
        round_trip_seconds: Of the last Ping, behind whatever data was before it; senders only.
        fallbacks_total: Times that another transport was taken than the one chosen.
        last_error: What went wrong last; empty when nothing has.
        age_seconds: Since the pair was made.
    """

    peer: str
    address: str
    direction: str
    transport: str
    curve: bool
    state: str
    bytes_total: int = 0
    chunks_total: int = 0
    resent_total: int = 0
    refused_total: int = 0
    outstanding_bytes: int = 0
    credit_free_bytes: int = 0
    credit_wait_seconds_total: float = 0.0
    bandwidth_bytes_per_second: float = 0.0
    round_trip_seconds: float = 0.0
    fallbacks_total: int = 0
    last_error: str = ""
    age_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One process of the cluster; the units of `values` are in their names."""

    worker_id: str
    role: str
    state: str
    address: str
    model: str
    model_fingerprint: str
    version: str
    uptime_seconds: float
    incarnation: int
    values: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    pairs: tuple[PairStatus, ...] = ()
