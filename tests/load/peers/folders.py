"""Where peers live: a folder for each, with a virtual environment of its own.

$DRYSTONE_PEERS, else peers/ in Drystone's cache
├── vllm/venv
├── llama.cpp/{venv,source,build}
└── transformers/{venv,model}
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.model.catalog import cache_dir

Tell = Callable[[str], None]
_COMPLETE = "complete"


def peers_dir() -> Path:
    """DRYSTONE_PEERS, else `peers` in Drystone's cache."""
    own = os.environ.get("DRYSTONE_PEERS")
    return Path(own).expanduser() if own else cache_dir() / "peers"


@dataclass(frozen=True, slots=True)
class PeerFolder:
    """The folder of one peer. A stamp says that its installation came to its end, and of which version.

    Args:
        path: The folder; made on installation.
        version: Version that is wanted.
    """

    path: Path
    version: str

    @property
    def python(self) -> Path:
        """Interpreter of the peer's own environment."""
        return self.path / "venv" / "bin" / "python"

    @property
    def complete(self) -> bool:
        """True when this version is installed to its end."""
        stamp = self.path / _COMPLETE
        return stamp.is_file() and stamp.read_text().strip() == self.version

    def mark_complete(self) -> None:
        """Says that the installation came to its end."""
        (self.path / _COMPLETE).write_text(f"{self.version}\n")

    def make_environment(self, tell: Tell) -> None:
        """Makes the virtual environment, once."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.python.is_file():
            tell(f"making {self.path / 'venv'}")
            venv.create(self.path / "venv", with_pip=True, symlinks=True)

    def pip(self, *arguments: str) -> None:
        """Runs pip in the peer's environment.

        Raises:
            subprocess.CalledProcessError: It failed; its own message is on stderr.
        """
        quiet = ("--disable-pip-version-check", "--no-input", "-qq")
        run([str(self.python), "-m", "pip", *quiet, *arguments], self.path)


def run(command: Sequence[str], folder: Path) -> None:
    """Runs one step of an installation at low priority; its output goes to stderr.

    Raises:
        subprocess.CalledProcessError: The step failed.
    """
    nice = ("nice", "-n", "15")
    subprocess.run([*nice, *command], cwd=folder, check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)
