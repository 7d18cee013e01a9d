"""Names of models, and the local Hugging Face folder that each stands for.

default            SmolLM2-135M-Instruct, from its GGUF file, converted once
a folder           itself
a path to *.gguf   converted once, kept by the file's hash
anything else      a repository of the Hugging Face hub
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from shared.model import ModelError
from shared.model.download import GGUF_SHA256, obtain_default_gguf
from shared.model.gguf import converted_folder, folder_name, is_converted

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT", "ModelError", "cache_dir", "check_folder", "display_name", "resolve_model"]

DEFAULT = "default"
DEFAULT_DISPLAY_NAME = "SmolLM2-135M-Instruct"

# Data only: no code (*.py) and nothing that unpickles (*.bin, *.pt, *.pth).
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def display_name(name: str) -> str:
    """The name that clients see: no path of the server's machine is in it."""
    if name == DEFAULT:
        return DEFAULT_DISPLAY_NAME
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else name


def cache_dir() -> Path:
    """Drystone's cache: DRYSTONE_CACHE, else XDG_CACHE_HOME/drystone, else ~/.cache/drystone."""
    own = os.environ.get("DRYSTONE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "drystone"


def resolve_model(name: str, announce: Callable[[str], None]) -> Path:
    """The local folder of a model, obtained on first use.

    Args:
        name: `default`, a folder, a GGUF file or a hub repository.
        announce: Called with one line of text for each slow step.

    Returns:
        Folder with config.json, safetensors and tokenizer.

    Raises:
        ModelError: The model cannot be had; the message says what to do.
    """
    models = cache_dir() / "models"
    if name == DEFAULT:
        folder = models / folder_name(DEFAULT_DISPLAY_NAME, GGUF_SHA256)
        if is_converted(folder):
            return folder
        gguf = obtain_default_gguf(cache_dir() / "downloads", announce)
        return converted_folder(gguf, models, DEFAULT_DISPLAY_NAME, announce)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"No GGUF file at {path}.")
        return converted_folder(path, models, path.stem, announce)
    if path.is_dir():
        return check_folder(path)
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"No model folder at {path}. Give a folder, a .gguf file, a hub id, or '{DEFAULT}'.")
    return check_folder(_snapshot(name, announce))


def check_folder(folder: Path) -> Path:
    """Refuses a folder that is not a whole safetensors checkpoint with its tokenizer.

    Returns:
        `folder`.

    Raises:
        ModelError: Something is missing; the message names it.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = " It holds *.bin weights, which are pickles and never loaded." if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder} has no *.safetensors weights.{pickled} Save the model with safetensors.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): copy it next to the weights.")
    return folder


def _snapshot(name: str, announce: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    advice = (
        "Download it where the hub can be reached (`hf download`) and pass the folder with --model; "
        f"'{DEFAULT}' needs only the package index."
    )
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, local_files_only=True))
    except LocalEntryNotFoundError:
        announce(f"downloading {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name} is no local folder and the hub gave no copy: {_first_line(error)}. {advice}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
