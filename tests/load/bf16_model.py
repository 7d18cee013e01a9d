"""The model folder that every system serves: bfloat16 safetensors, converted once where the original is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from tests.load.peers.folders import Tell, peers_dir

_COPIED: Final = ("*.json", "*.jinja", "*.txt", "tokenizer.model")


def bf16_folder(model: Path, tell: Tell) -> Path:
    """The folder itself when all its tensors are bfloat16, else a converted copy beside the peers.

    Raises:
        OSError: The folder cannot be read, or the copy not written.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    files = sorted(model.glob("*.safetensors"))
    types: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            types.update(opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118 - no mapping
    if types == {"BF16"}:
        return model
    import torch

    copy = peers_dir() / "models" / f"{model.name}-bf16"
    if not copy.is_dir():
        tell(f"making a bfloat16 copy of {model.name}")
        part = copy.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for pattern in _COPIED:
            for file in model.glob(pattern):
                shutil.copy(file, part)
        for file in files:
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
            save_file(tensors, part / file.name, metadata={"format": "pt"})
        config = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))
        part.rename(copy)
    return copy
