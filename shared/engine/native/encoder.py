"""Encoding blocks on the fused decoder; proved at load against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shared import logs
from shared.engine.encode import encode_block, new_extent
from shared.engine.native.agreement import excess
from shared.engine.native.builder import NativeKernel
from shared.engine.native.decoder import NativeDecoder, StepTables, UnfusedError
from shared.engine.served_model import ServedModel

_PROOF_TOKENS = 70
_NO_ROWS = torch.empty(0, dtype=torch.int64)
_NO_TURNS = torch.empty(0, 0)


@dataclass(frozen=True, slots=True)
class NativeEncoder:
    """Computes the KV of a block, chunk by chunk. Made by `prove`; stateless."""

    _decoder: NativeDecoder

    @classmethod
    @torch.inference_mode()
    def prove(cls, model: ServedModel, kernel: NativeKernel) -> NativeEncoder | None:
        """The encoder of a model, or None with the reason logged.

        Random tokens are encoded by transformers' forward twice, in chunks of two sizes, which are equal but for
        rounding, and by this encoder; the KV of every layer must agree within what rounding explains.
        """
        log = logs.get("native_encoder")
        try:
            encoder = cls(NativeDecoder.read(model, kernel))
        except UnfusedError as error:
            log.info("native_encoder_off", reason=str(error))
            return None
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.vocabulary_size, (_PROOF_TOKENS,), generator=draw)
        one, other, ours = (new_extent(model.geometry.shape, _PROOF_TOKENS) for _ in range(3))
        encode_block(model, ids.tolist(), one)
        encode_block(model, ids.tolist(), other, _PROOF_TOKENS // 2 + 1)
        for start, end in ((0, _PROOF_TOKENS // 2), (_PROOF_TOKENS // 2, _PROOF_TOKENS)):
            encoder.encode_chunk(ids[start:end], start, ours)
        # Keys and values of each layer apart.
        parts = (extent.transpose(1, 2).flatten(0, 1) for extent in (one, other, ours))
        worst = max(excess(a, b, c, model.dtype) for a, b, c in zip(*parts, strict=True))
        if not worst <= 1:
            log.warning("native_encoder_off", reason=f"{worst:.1f} times as far from the model's forward as allowed")
            return None
        log.info("native_encoder_on", of_allowed_distance=round(worst, 2))
        return encoder

    @torch.inference_mode()
    def encode_chunk(
        self,
        token_ids: torch.Tensor,
        start: int,
        extent: torch.Tensor,
        stops: Sequence[int] = (),
        done: Callable[[int], None] | None = None,
    ) -> None:
        """Fills rows [start, start + n) of a block's KV; the rows before them are filled already.

        Args:
            token_ids: int64 [n].
            start: Position of the first row in the block.
            extent: [layers, tokens, 2, kv_heads, head_dim].
            stops: Counts of layers, rising, below all; layers in between are computed in one call.
            done: Called with each of them, when so many layers have these rows.
        """
        layers, tokens = extent.shape[:2]
        rows = len(token_ids)
        positions = torch.arange(start, start + rows)
        own = torch.arange(rows)
        pieces = [[start, tokens, rows, 0, rows, 0]]
        stacked = own
        if start:
            pieces.append([0, tokens, start, rows, rows, -1])
            stacked = torch.cat((own, own))
        step = StepTables(
            extent.view(layers * tokens, -1), positions, tokens, torch.tensor(pieces), stacked, _NO_TURNS, _NO_TURNS
        )
        self._decoder.run(token_ids, positions, _NO_ROWS, step, stops, done)
