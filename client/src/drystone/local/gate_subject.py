"""The service under test by the exactness gate."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, Unpack

import torch

from drystone import AsyncClient, GenerateOptions, Truncation
from drystone.local.gate_rules import Served
from drystone.local.stack import InProcessStack

if TYPE_CHECKING:
    from decode_worker.request import Request

Attention = Literal["block", "full"]


class Subject:
    """A whole service in this process, with an eye on the logits of its question rows.

    Args:
        folder: Local model folder.
        dtype: Type that it serves in.
        attention: "block" or "full".
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, folder: Path, dtype: str, attention: Attention, max_new_tokens: int) -> None:
        self._rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._requests: dict[str, Request] = {}
        self._attention = attention
        self._max_new_tokens = max_new_tokens
        self._stack = InProcessStack(folder, dtype=dtype, trace=self._trace)

    def _trace(self, request: Request, logits: torch.Tensor, position: int) -> None:
        self._requests[request.request_id] = request
        if position < request.prompt_tokens:
            self._rows[request.request_id].append(logits)

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        self._client = AsyncClient(self._stack.address)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()
        await self._stack.__aexit__(None, None, None)

    def idle_invariant(self) -> bool:
        """True when nothing is held now that nothing runs (raises AssertionError when memory does not tile)."""
        engine = self._stack.decode_apps[0].engine
        holding = engine.lifecycle.holding
        engine.pool.check_integrity(holding)
        return not holding and not engine.pool.blocks.pins and not len(engine.pool.fetches)

    async def ask(
        self, question: str | None = None, **prompt: Unpack[GenerateOptions]
    ) -> tuple[list[list[int]], list[int], Served]:
        """Asks greedily. Returns token ids of the blocks, of the question block, and what was answered.

        The ids are those that reached the engine, so that the reference gets the very same.
        """
        options: GenerateOptions = {
            "attention": self._attention,
            "truncation": Truncation("right"),
            "max_new_tokens": self._max_new_tokens,
            **prompt,
        }
        answer = await self._client.generate(question, **options)
        request = self._requests.pop(answer.request_id)
        sample = answer.samples[0]
        rows = torch.cat(self._rows.pop(answer.request_id))
        served = Served(list(sample.token_ids), sample.matched_stop_token_id, rows)
        return [list(block.token_ids) for block in request.blocks], list(request.question_ids), served
