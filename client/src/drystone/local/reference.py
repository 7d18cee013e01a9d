"""The reference: block attention computed in one dense forward by plain transformers.

It shares no code with the engine on purpose: served output is held against it.

    rows: queries, columns: keys                 A A A B B Q Q
    . masked   x attended                    A   x . . . . . .
                                             A   x x . . . . .
    documents are causal squares,            A   x x x . . . .
    the question and what is generated       B   . . . x . . .
    attend to everything before them         B   . . . x x . .
                                             Q   x x x x x x .
                                             Q   x x x x x x x
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL = "full_attention"
_SLIDING = "sliding_attention"


class Stop(StrEnum):
    """Why a reference run ended."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(slots=True)
class ReferenceRun:
    """What the reference computed for one prompt.

    Attributes:
        token_ids: Greedy tokens; an EOS token ends the run and is not among them. In a teacher-forced run, the
            argmax of every step, EOS tokens included.
        logits_first: Logits of the first generated position, float32 [vocab].
        question_logits: Logits of every row of the last block, float32 [rows, vocab], when asked for.
        step_top2_gaps: Per step, largest minus second largest logit; one entry per step computed, so a run that
            ends by EOS has one more than it has tokens.
        step_forced_gaps: Teacher-forced runs only: per step, largest logit minus the forced token's.
        stop: Why the run ended.
    """

    logits_first: torch.Tensor
    token_ids: list[int] = field(default_factory=list)
    question_logits: torch.Tensor | None = None
    step_top2_gaps: list[float] = field(default_factory=list)
    step_forced_gaps: list[float] = field(default_factory=list)
    stop: Stop = Stop.LENGTH


class Reference:
    """A checkpoint under plain transformers with `sdpa` attention and explicit masks.

    Args:
        folder: Hugging Face folder with safetensors and a tokenizer.
        dtype: Dtype of weights and activations.
        device: torch device.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self.device = torch.device(device)
        with _without_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(self.device).eval()
        self.dtype = dtype
        self.eos_ids = _eos_ids(self.model.generation_config, AutoTokenizer.from_pretrained(folder))
        self.windows = _windows(self.model.config)
        # Sampling defaults of the checkpoint must neither act nor warn.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=sorted(self.eos_ids) or None,
            pad_token_id=min(self.eos_ids, default=0),
        )

    @torch.inference_mode()
    def block_generate(
        self,
        blocks: list[list[int]],
        question: list[int],
        max_new_tokens: int,
        forced: list[int] | None = None,
        *,
        keep_question_logits: bool = False,
    ) -> ReferenceRun:
        """Greedy block-attention generation. With no blocks it is full attention over the question.

        Args:
            blocks: Token ids of the documents, each attending to itself alone.
            question: Token ids of the last block, at least one.
            max_new_tokens: Bound on generated tokens; a teacher-forced run takes `len(forced)` steps instead.
            forced: Tokens to feed in place of the argmax, for comparing an answer step by step.
            keep_question_logits: Keep the logits of every question row.

        Returns:
            The run.
        """
        ids = [token for block in (*blocks, question) for token in block]
        steps = max_new_tokens if forced is None else len(forced)
        cache = DynamicCache()
        mask = block_mask([len(block) for block in blocks], len(question), self.device)
        logits = self._forward(ids, 0, mask, cache, rows=len(question) if keep_question_logits else 1)
        run = ReferenceRun(logits[-1], question_logits=logits if keep_question_logits else None)
        for step in range(steps):
            last = logits[-1]
            token = _record(run, last)
            if forced is not None:
                run.step_forced_gaps.append(float(last.max() - last[forced[step]]))
                run.token_ids.append(token)
                token = forced[step]
            elif token in self.eos_ids:
                run.stop = Stop.EOS
                break
            else:
                run.token_ids.append(token)
            if step + 1 < steps:
                position = len(ids) + step
                row = torch.ones(1, position + 1, dtype=torch.bool, device=self.device)
                logits = self._forward([token], position, row, cache, rows=1)
        return run

    @torch.inference_mode()
    def full_generate(self, prompt_ids: list[int], max_new_tokens: int) -> ReferenceRun:
        """Ordinary greedy `generate()` over the whole prompt.

        Args:
            prompt_ids: Token ids of the prompt.
            max_new_tokens: Bound on generated tokens, at least one.

        Returns:
            The run, without question logits.
        """
        ids = torch.tensor([prompt_ids], device=self.device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        run = ReferenceRun(out.logits[0][0].float())
        for step in out.logits:
            token = _record(run, step[0].float())
            if token in self.eos_ids:
                run.stop = Stop.EOS
                break
            run.token_ids.append(token)
        return run

    def _forward(
        self, ids: list[int], first: int, allowed: torch.Tensor, cache: DynamicCache, rows: int
    ) -> torch.Tensor:
        """Runs tokens at positions first.. and returns the last rows' logits, float32 [rows, vocab].

        The cache is given no config: it keeps every key, and windows are a matter of the mask alone.
        """
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.arange(first, first + len(ids), device=self.device)[None],
            attention_mask=self._masks(allowed, first),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=rows,
        )
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def _masks(self, allowed: torch.Tensor, first: int) -> Any:
        """Additive masks [1, 1, queries, keys]; a dict by layer type where the model mixes them."""
        masks = {kind: self._additive(_windowed(allowed, first, window)) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)[None, None]


def block_mask(lengths: list[int], question: int, device: torch.device) -> torch.Tensor:
    """Who may attend to whom, from the definition of block attention.

    Args:
        lengths: Tokens of each document.
        question: Tokens of the last block.
        device: Where the mask lives.

    Returns:
        Boolean [queries, keys], True where attended.
    """
    documents = sum(lengths)
    total = documents + question
    allowed = torch.zeros(total, total, dtype=torch.bool, device=device)
    start = 0
    for length in lengths:
        end = start + length
        allowed[start:end, start:end] = True
        start = end
    allowed[documents:] = True
    return allowed.tril_()


def _windowed(allowed: torch.Tensor, first: int, window: int | None) -> torch.Tensor:
    """Cuts a mask to keys less than `window` tokens before their query, which stands at first + row."""
    if window is None:
        return allowed
    queries = torch.arange(first, first + allowed.shape[0], device=allowed.device)[:, None]
    return allowed & (queries - torch.arange(allowed.shape[1], device=allowed.device)[None] < window)


def _windows(config: Any) -> dict[str, int | None]:
    """Window in tokens by layer type; None means no window.

    Raises:
        NotImplementedError: A layer type whose mask is not known here.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [_FULL if window is None else _SLIDING])
    if unknown := kinds - {_FULL, _SLIDING}:
        raise NotImplementedError(f"the reference has no mask for layers of type {', '.join(sorted(unknown))}")
    return {kind: window if kind == _SLIDING else None for kind in sorted(kinds)}


def _eos_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    given = generation_config.eos_token_id
    ids = set(given if isinstance(given, list) else [given])
    return frozenset(ids | {tokenizer.eos_token_id}) - {None}


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _record(run: ReferenceRun, logits: torch.Tensor) -> int:
    """Notes a step's top-two gap and returns its argmax; logits float32 [vocab]."""
    top = logits.topk(2)
    run.step_top2_gaps.append(float(top.values[0] - top.values[1]))
    return int(logits.argmax())
