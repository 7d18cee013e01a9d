"""transformers' own server with continuous batching and its paged prefix cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.load.peers.folders import PeerFolder, Tell, peers_dir
from tests.load.peers.peer import Chunk, Cores
from tests.load.peers.server import Launch, Server, free_port

_VERSION: Final = "5.23.0"
_TORCH: Final = "torch==2.13.0"


class TransformersCb:
    """`transformers serve --continuous-batching`. One process: its HTTP front end shares the engine's core."""

    name = "transformers"
    version = _VERSION
    setting = "bf16, continuous batching, sdpa, pages of 32"
    path = "/v1/completions"

    def __init__(self) -> None:
        self._folder = PeerFolder(peers_dir() / self.name, _VERSION)
        self._model = ""

    def missing(self) -> str:
        """Empty once installed."""
        return "" if self._folder.complete else "not installed: python -m tests.load.peers install transformers"

    def install(self, tell: Tell) -> None:
        """About 1.2 GB and a minute."""
        self._folder.make_environment(tell)
        tell(f"installing {_TORCH}")
        self._folder.pip("install", _TORCH)
        tell(f"installing transformers[serving] {_VERSION}")
        self._folder.pip("install", f"transformers[serving]=={_VERSION}")
        self._folder.mark_complete()

    def start(self, model: Path, threads: int, cores: Cores) -> Server:
        """Starts it with the model loaded."""
        port = free_port()
        self._model = str(model)
        command = [
            *(str(self._folder.python.parent / "transformers"), "serve", self._model),
            *("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "2048"),
            *("--cb-max-batch-tokens", "2048", "--no-cb-use-cuda-graph"),
            *("--attn-implementation", "sdpa", "--device", "cpu", "--dtype", "bfloat16"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        return Server(Launch(command, port, environment), cores.engine, self._folder.path / "server.log")

    def body(self, text: str, ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """Takes text alone. An end token that no model has keeps it from stopping."""
        del ids
        config = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1}
        return {
            "model": self._model,
            "prompt": text,
            "max_tokens": tokens,
            "stream": True,
            "generation_config": json.dumps(config),
        }

    def read(self, event: Mapping[str, Any]) -> Chunk:
        """One token an event, counted in the last one."""
        if usage := event.get("usage"):
            return Chunk(total_tokens=usage["completion_tokens"], prompt_tokens=usage["prompt_tokens"])
        return Chunk(new_tokens=1)
