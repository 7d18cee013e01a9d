"""A whole step in one call, for models whose structure is known; proved at load against transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decode_worker.arena import Arena, Extent
from decode_worker.attention.flash import FlashAttention
from decode_worker.attention.native import NativeAttention, pieces_table
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import SEGMENT_TOKENS, Tail
from shared import logs
from shared.engine.native.agreement import excess
from shared.engine.native.builder import NativeKernel
from shared.engine.native.decoder import NativeDecoder, StepTables, UnfusedError
from shared.engine.served_model import ServedModel

_BLOCK_TOKENS = 40


class FusedDecoder:
    """Runs steps of one model on one arena. Made by `prove`; used by the engine thread alone."""

    def __init__(self, decoder: NativeDecoder, arena: Arena) -> None:
        self._decoder = decoder
        self._arena = arena

    @classmethod
    @torch.inference_mode()
    def prove(cls, model: ServedModel, arena: Arena, kernel: NativeKernel) -> FusedDecoder | None:
        """The decoder of a model, or None with the reason logged.

        Random tokens run through transformers' forward and through the fused one, over blocks, a sealed tail and rows
        of their own; logits and the KV of every layer must agree.
        """
        log = logs.get("fused_decoder")
        try:
            decoder = NativeDecoder.read(model, kernel)
            worst = _worst_excess(model, decoder, kernel)
        except UnfusedError as error:
            log.info("fused_decoder_off", reason=str(error))
            return None
        if not worst <= 1:
            log.warning("fused_decoder_off", reason=f"{worst:.1f} times as far from the model's own forward as allowed")
            return None
        log.info("fused_decoder_on", of_allowed_distance=round(worst, 2))
        return cls(decoder, arena)

    def takes(self, plan: StepPlan) -> bool:
        """True when this decoder computes such a step."""
        return len(plan.token_ids) > 0

    @torch.inference_mode()
    def logits(self, plan: StepPlan, keep: torch.Tensor) -> torch.Tensor:
        """Runs a step and writes the rows' own KV.

        Args:
            plan: The step; addresses are read from it now.
            keep: int64: rows whose logits are wanted.

        Returns:
            float32 [len(keep), vocab].
        """
        return self._decoder.run(plan.token_ids, plan.positions, keep, tables(plan, self._arena, self._decoder))


def tables(plan: StepPlan, arena: Arena, decoder: NativeDecoder) -> StepTables:
    """A plan as the kernel reads it."""
    cosine, sine = decoder.rotation.tables(-plan.bases[: plan.turned])
    return StepTables(arena.records, plan.slots, SEGMENT_TOKENS, pieces_table(plan), plan.rows, cosine, sine)


class _Scene:
    """Two requests over one block at different offsets, on an arena of their own with the same values every time."""

    def __init__(self, model: ServedModel) -> None:
        shape = model.geometry.shape
        self.arena = Arena(shape, shape.extent_bytes(_BLOCK_TOKENS + 4 * SEGMENT_TOKENS), torch.device("cpu"))
        draw = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, model.vocabulary_size, (2 * SEGMENT_TOKENS,), generator=draw).tolist()
        # Keys and values of no model: their spread is near that of real ones.
        self.arena.records.normal_(generator=draw)
        self._requests: list[tuple[Placement, Tail]] = []
        block = self._extent(_BLOCK_TOKENS)
        for offset in (0, 7):
            segments = [self._extent(SEGMENT_TOKENS) for _ in range(2)]
            tail = Tail(self.arena, offset + _BLOCK_TOKENS, own=segments)
            self._requests.append((Placement(b"proof", block, offset), tail))

    def _extent(self, tokens: int) -> Extent:
        extent = self.arena.allocate(tokens)
        if extent is None:
            raise MemoryError("the proof's own arena is too small")
        return extent

    def plan(self, counts: Sequence[int]) -> StepPlan:
        """A step of so many rows of each request; their tails count them as written."""
        spans = []
        for (placement, tail), count in zip(self._requests, counts, strict=True):
            spans.append(RowSpan(self._ids[tail.filled : tail.filled + count], [placement], tail))
        plan = StepPlan(spans)
        for (_, tail), count in zip(self._requests, counts, strict=True):
            tail.filled += count
        return plan


def _worst_excess(model: ServedModel, decoder: NativeDecoder, kernel: NativeKernel) -> float:
    """How far the fused step is from transformers' forward, over what rounding explains; at most 1 when they agree.

    transformers' forward runs with either attention, which are equal but for rounding.
    """
    layers, worst = model.geometry.shape.layers, 0.0
    flash, native, fused = _Scene(model), _Scene(model), _Scene(model)
    for counts in ((70, 1), (1, 1)):
        plans = [scene.plan(counts) for scene in (flash, native, fused)]
        ids, positions = plans[0].token_ids, plans[0].positions
        keep = torch.tensor([0, len(ids) - 1])
        contexts = (
            FlashAttention(flash.arena, model.geometry.layers).begin(plans[0]),
            NativeAttention(native.arena, model.geometry.layers, kernel).begin(plans[1]),
        )
        logits = [model.forward_logits(ids, positions, keep, context) for context in contexts]
        logits.append(decoder.run(ids, positions, keep, tables(plans[2], fused.arena, decoder)))
        slots = plans[0].slots + torch.arange(layers)[:, None] * SEGMENT_TOKENS
        kv = [_by_layer(scene.arena.records[slots]) for scene in (flash, native, fused)]
        compared = [logits, *zip(*kv, strict=True)]
        worst = max(worst, *(excess(one, other, ours, model.dtype) for one, other, ours in compared))
    return worst


def _by_layer(records: torch.Tensor) -> torch.Tensor:
    """Records [layers, rows, 2 * width] as [layers * 2, rows, width]: keys and values of each layer apart."""
    layers, rows, _ = records.shape
    return records.view(layers, rows, 2, -1).transpose(1, 2).flatten(0, 1)
