"""What a model is, as 32 bytes: the same for every copy of a checkpoint, another for any other.

    sha256( "drystone-model-1"
            | length | canonical config.json without its volatile keys
            | for each *.safetensors by name:  length | name | sha256 of its content )

Two workers with equal fingerprints compute the same KV up to rounding; the dtype is a field of its own in block keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from shared.model import ModelError

if TYPE_CHECKING:
    from pathlib import Path

FINGERPRINT_BYTES = 32

_DOMAIN = b"drystone-model-1"
_VOLATILE_KEYS = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})
_MAX_THREADS = 8


def fingerprint(folder: Path) -> bytes:
    """Digest over the config and the weights of a Hugging Face folder.

    Args:
        folder: Folder with config.json and at least one *.safetensors file.

    Returns:
        32 bytes. Where the folder lies, who saved it and in what order files were written do not matter.

    Raises:
        ModelError: The folder has no config or no weights, or one of them cannot be read.
    """
    weights = sorted(folder.glob("*.safetensors"), key=lambda file: file.name)
    if not weights:
        raise ModelError(f"{folder} has no *.safetensors weights.")
    digest = hashlib.sha256(_DOMAIN)
    try:
        _add(digest, _canonical_config(folder / "config.json"))
        with ThreadPoolExecutor(min(len(weights), os.cpu_count() or 1, _MAX_THREADS)) as pool:
            for file, content in zip(weights, pool.map(_file_digest, weights), strict=True):
                _add(digest, file.name.encode())
                digest.update(content)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}") from error
    return digest.digest()


def _canonical_config(file: Path) -> bytes:
    config = _without_volatile(json.loads(file.read_text(encoding="utf-8")))
    return json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _without_volatile(value: Any) -> Any:
    """Nested configs (text_config and the like) carry the same volatile keys."""
    if isinstance(value, dict):
        return {key: _without_volatile(inner) for key, inner in value.items() if key not in _VOLATILE_KEYS}
    return [_without_volatile(inner) for inner in value] if isinstance(value, list) else value


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _add(digest: hashlib._Hash, field: bytes) -> None:
    digest.update(len(field).to_bytes(8, "big"))
    digest.update(field)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def tokenizer_fingerprint(folder: Path) -> bytes:
    """Digest over the files that decide which token ids a text becomes.

    Args:
        folder: Hugging Face folder.

    Returns:
        32 bytes; chat templates are not part of it.

    Raises:
        ModelError: The folder has no tokenizer, or a file of it cannot be read.
    """
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise ModelError(f"{folder} has no tokenizer files.")
    digest = hashlib.sha256(b"drystone-tokenizer-1")
    try:
        for file in files:
            _add(digest, file.name.encode())
            digest.update(_file_digest(file))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
    return digest.digest()
