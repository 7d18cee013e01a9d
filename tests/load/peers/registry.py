"""Peers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.load.peers.llama_cpp import LlamaCpp
from tests.load.peers.peer import Peer
from tests.load.peers.transformers_cb import TransformersCb
from tests.load.peers.vllm import Vllm

PEERS: Final[Mapping[str, Callable[[], Peer]]] = {
    "vllm": Vllm,
    "llama.cpp": lambda: LlamaCpp("bf16"),
    "llama.cpp-q4_1": lambda: LlamaCpp("q4_1"),
    "transformers": TransformersCb,
}


def peer(name: str) -> Peer:
    """The peer of a name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return PEERS[name]()
