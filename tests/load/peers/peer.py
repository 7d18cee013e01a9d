"""What is asked of a peer: to be installed, to be started, and to be spoken to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.load.peers.folders import Tell
from tests.load.peers.server import Server


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores of one run.

    Args:
        engine: Core of whatever computes tokens.
        helper: Core of the client and of what only helps: gateways, HTTP front ends.
    """

    engine: int
    helper: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event of a stream said. None: nothing about it.

    Args:
        new_tokens: Tokens that it brought, where it brings pieces.
        total_tokens: Tokens so far, where it counts; wins over `new_tokens`.
        prompt_tokens: Tokens of the prompt as the peer counted them.
        cached_tokens: Those of them whose KV the peer had.
    """

    new_tokens: int = 0
    total_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class Peer(Protocol):
    """A server to measure beside. One thread, greedy, its strongest setting for repeated passages."""

    @property
    def name(self) -> str:
        """Name on the command line and in tables."""

    @property
    def version(self) -> str:
        """Version that is installed."""

    @property
    def setting(self) -> str:
        """Type of weights, and the setting that it runs with."""

    @property
    def path(self) -> str:
        """Path of its streaming completion."""

    def missing(self) -> str:
        """Why it cannot be started; empty when it can."""

    def install(self, tell: Tell) -> None:
        """Installs it into its own folder.

        Raises:
            subprocess.CalledProcessError: A step failed; its output is on stderr.
        """

    def start(self, model: Path, threads: int, cores: Cores) -> Server:
        """Starts it on one core.

        Args:
            model: Hugging Face folder, bfloat16 safetensors.
            threads: Threads that compute.
            cores: Where it runs.

        Raises:
            PeerError: It did not start.
        """

    def body(self, text: str, ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """Request for exactly `tokens` greedy tokens; a peer takes the ids where its door does, else the text."""

    def read(self, event: Mapping[str, Any]) -> Chunk:
        """What one event of its stream says."""
