"""A model in memory, proved and ready to run through the seam."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from shared import logs
from shared.engine import seam
from shared.engine.loading import Progress, read_ahead
from shared.engine.probe import ModelGeometry, ProbeError, probe
from shared.engine.seam import AttentionContext
from shared.kv.keys import KeySpace
from shared.kv.layout import LAYOUT_VERSION
from shared.model.catalog import ModelError
from shared.model.fingerprint import fingerprint

_PROGRESS_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of one worker. The module is used by one thread at a time: its owner's engine thread.

    Attributes:
        name: Name that clients ask for.
        folder: Local Hugging Face folder.
        module: The transformers model, in eval mode.
        geometry: What the probe proved.
        fingerprint: 32-byte digest of weights and config.
        context_tokens: Longest prompt and answer together.
        eos_token_ids: Tokens that end an answer.
    """

    name: str
    folder: Path
    module: Any
    geometry: ModelGeometry
    fingerprint: bytes
    context_tokens: int
    eos_token_ids: frozenset[int]

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and KV."""
        named: torch.dtype = getattr(torch, self.geometry.shape.dtype)
        return named

    @property
    def device(self) -> torch.device:
        """Where weights and KV live."""
        where: torch.device = self.module.device
        return where

    @property
    def vocabulary_size(self) -> int:
        """Token ids that the model has embeddings for."""
        return int(self.module.get_input_embeddings().num_embeddings)

    def key_space(self, tenant_salt: bytes = b"") -> KeySpace:
        """What this model's block keys are made of."""
        shape, regime = self.geometry.shape, self.geometry.rope_regime()
        return KeySpace(self.fingerprint, shape.dtype, LAYOUT_VERSION, regime, tenant_salt)

    @torch.inference_mode()
    def forward_kv(self, token_ids: torch.Tensor, positions: torch.Tensor, context: AttentionContext) -> None:
        """Runs the layers for their KV alone, without the language-model head.

        Args:
            token_ids: int64 [rows].
            positions: int64 [rows].
            context: Takes each layer's KV.
        """
        body = getattr(self.module, self.module.base_model_prefix)
        ids, places = (t.to(self.device, non_blocking=True)[None] for t in (token_ids, positions))
        body(ids, position_ids=places, use_cache=False, drystone=context)

    @torch.inference_mode()
    def forward_logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Runs the model and returns logits float32 [len(keep), vocab] of the rows `keep` (int64), on its device."""
        ids, places, rows = (t.to(self.device, non_blocking=True) for t in (token_ids, positions, keep))
        output = self.module(
            ids[None], position_ids=places[None], use_cache=False, logits_to_keep=rows, drystone=context
        )
        logits: torch.Tensor = output.logits[0]
        return logits.to(torch.float32)


def load(
    folder: Path,
    *,
    name: str,
    dtype: str,
    device: str = "cpu",
    context_tokens: int | None = None,
    progress: Progress | None = None,
) -> ServedModel:
    """Loads and proves a model.

    Weights that are stored in `dtype` stay mapped to their files: processes of one machine share the page cache.
    Others are converted into this process's own memory.

    Args:
        folder: Local Hugging Face folder with safetensors.
        name: Name that clients ask for.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: torch device.
        context_tokens: Served context; None takes the model's own, and more than that is refused.
        progress: Called with the fraction done, from 0 to 1, never falling.

    Raises:
        ModelError: Block attention cannot be proved exact for it, or its files cannot be read.
        ValueError: Unknown dtype or context.
    """
    _check_device(device)
    seam.register()
    chosen = choose_dtype(dtype, device)
    config = AutoConfig.from_pretrained(folder)
    limit = int(config.get_text_config().max_position_embeddings)
    context = context_tokens or limit
    if context > limit:
        raise ValueError(f"context_tokens: {context} is more than the model's {limit}")
    log, began = logs.get("model"), time.monotonic()
    tell = progress or _logged(log)
    log.info("loading_model", model=name, dtype=chosen)
    size = _read_weights(folder, tell)
    transformers_logging.disable_progress_bar()  # workers log; they have no terminal
    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, chosen), attn_implementation=seam.NAME, use_safetensors=True
    )
    module = module.to(device).eval().requires_grad_(requires_grad=False)
    try:
        geometry = probe(module, dtype=chosen, context_tokens=context)
    except ProbeError as error:
        raise ModelError(f"{name} cannot be served with block attention: {error}") from error
    model = ServedModel(name, folder, module, geometry, fingerprint(folder), context, eos_token_ids(module, folder))
    tell(1.0)
    log.info("model_loaded", model=name, bytes=size, seconds=round(time.monotonic() - began, 1))
    return model


def _read_weights(folder: Path, progress: Progress) -> int:
    try:
        return read_ahead(sorted(folder.glob("*.safetensors")), progress)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error


def _logged(log: logs.Logger) -> Progress:
    """Progress as a log line every few seconds."""
    told = time.monotonic()

    def tell(fraction: float) -> None:
        nonlocal told
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("loading_model", percent=round(100 * fraction))

    return tell


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is not a torch device") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r} is not served; it is cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r}: this torch sees no GPU")


def choose_dtype(dtype: str, device: str) -> str:
    """Resolves "auto": bfloat16 where the hardware multiplies it, else float32."""
    if dtype == "auto":
        fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - torch has no public query
        return "bfloat16" if fast else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: {dtype!r} is none of auto, float32, bfloat16, float16")
    return dtype


def eos_token_ids(module: Any, folder: Path) -> frozenset[int]:
    """End-of-sequence tokens: the generation config's and the tokenizer's."""
    from transformers import AutoTokenizer

    configured = module.generation_config.eos_token_id
    ids: Sequence[int] = configured if isinstance(configured, list) else [configured]
    own = AutoTokenizer.from_pretrained(folder).eos_token_id
    return frozenset(token for token in (*ids, own) if token is not None)
