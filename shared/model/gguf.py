"""GGUF files, converted once into a Hugging Face folder of bfloat16 safetensors.

transformers reads a GGUF file in tens of seconds and silently drops some of its metadata (RoPE scaling,
sliding windows). Here the file is read once, what was dropped is put back or the file is refused, and the
result is kept: engine and reference then load the very same weights.

    <cache>/models/<name>-<first 16 digits of sha256>-v<CONVERTER_VERSION>/
        config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
        chat_template.jinja
        drystone-conversion.json      the marker, written last
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.file_lock import exclusive
from shared.model import ModelError
from shared.model.gguf_positions import ROPE_TENSORS, check_carried, rope_scaling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONVERTER_VERSION = 1
MARKER = "drystone-conversion.json"

_CONFIG_KEYS_DROPPED = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def folder_name(name: str, sha256: str) -> str:
    """Name of the converted folder of a GGUF file with this hexadecimal digest."""
    return f"{name}-{sha256[:16]}-v{CONVERTER_VERSION}"


def converted_folder(gguf: Path, models: Path, name: str, announce: Callable[[str], None]) -> Path:
    """The Hugging Face folder of a GGUF file, made on the first call.

    Safe to call from several processes at once: one converts, the others wait and find the result.

    Args:
        gguf: The GGUF file.
        models: Folder that holds converted models.
        name: Readable start of the folder's name.
        announce: Called with one line of text for each slow step.

    Returns:
        Folder with bfloat16 safetensors, config and tokenizer.

    Raises:
        ModelError: The file cannot be converted faithfully.
    """
    with gguf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    target = models / folder_name(name, sha256)
    if is_converted(target):
        return target
    models.mkdir(parents=True, exist_ok=True)
    with exclusive(models / f".{target.name}.lock", announce, "converts this model"):
        if is_converted(target):
            return target
        announce(f"converting {gguf.name} to safetensors (about 20 s, once)")
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models))
        try:
            convert(gguf, scratch)
            marker = {"source": gguf.name, "sha256": sha256, "converter": CONVERTER_VERSION}
            (scratch / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def is_converted(folder: Path) -> bool:
    """True when the folder holds a whole conversion; the marker is written last and the rename is atomic."""
    return (folder / MARKER).is_file()


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file's model, config and tokenizer into a folder; weights become bfloat16.

    Args:
        gguf: The GGUF file.
        folder: An existing, empty folder.

    Raises:
        ModelError: The architecture is unknown to transformers, or something in the file would be lost.
    """
    _require("torch", "gguf", "accelerate", "transformers")
    metadata, tensors = read_metadata(gguf)
    scaling = rope_scaling(metadata, tensors)
    model, tokenizer = _load(gguf)
    config = _clean_config(model.config)
    check_carried(config, metadata)
    if scaling:
        if "rope_theta" not in (config.rope_parameters or {}):
            raise ModelError(f"{gguf.name} scales RoPE, but {type(config).__name__} has RoPE per layer type.")
        config.rope_parameters = {**config.rope_parameters, **scaling}
    _save(model, config, tokenizer, folder)


def read_metadata(gguf: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of a GGUF file.

    Returns:
        (values by key, without the tokenizer's long lists; the RoPE tensors as float arrays by name).
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, OSError) as error:
        raise ModelError(f"{gguf} is not a readable GGUF file: {error}") from error
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.")}
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors if tensor.name in ROPE_TENSORS}
    return values, tensors


def _load(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        with _without_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, **source
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"transformers cannot read {gguf.name}: {error}") from error
    lost = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lost:
        raise ModelError(f"{gguf.name} lacks weights of {type(model).__name__}: {', '.join(lost[:5])}.")
    return model, tokenizer


def _clean_config(config: Any) -> Any:
    values = {key: value for key, value in config.to_dict().items() if key not in _CONFIG_KEYS_DROPPED}
    return type(config).from_dict(values)


def _save(model: Any, config: Any, tokenizer: Any, folder: Path) -> None:
    """Saves through a fresh model of the same class: one loaded from GGUF counts as quantised and refuses."""
    import torch
    from transformers import GenerationConfig

    config.dtype = torch.bfloat16
    ends = {config.eos_token_id, tokenizer.eos_token_id} - {None}
    with torch.device("meta"):
        plain = type(model)(config)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=tokenizer.pad_token_id,
    )
    with _without_bars():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require(*modules: str) -> None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise ModelError(
            f"Reading GGUF needs {', '.join(absent)}; run `pip install 'drystone-server[worker]'`, the worker extra."
        )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
