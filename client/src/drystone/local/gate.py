"""The exactness gate: is what is served what the reference computes?

Runs all three roles in this process over real sockets, and beside them the one-shot reference of
`drystone.local.reference`, which shares no code with the engine. float32: the same tokens, up to
counted near ties. Other types: the served logits are about as far from the float32 reference as the
reference's own in that type.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from rich.console import Console
from rich.progress import track

from drystone import AsyncClient, Truncation
from drystone.local.gate_prompts import GatePrompt, read_prompts
from drystone.local.gate_report import DtypeReport, Float32Report, GateReport, print_report
from drystone.local.gate_rules import Distance, Served, compare_tokens
from drystone.local.options import GateOptions
from drystone.local.reference import Reference
from drystone.local.stack import InProcessStack

if TYPE_CHECKING:
    from decode_worker.request import Request

Attention = Literal["block", "full"]
_FLOAT32 = "float32"


def main(options: GateOptions) -> int:
    """Runs the gate and prints its report; 0 when everything is equal, else 1."""
    from shared import logs
    from shared.model.catalog import ModelError, display_name, resolve_model

    logs.configure("error", "console")
    model = options.model or "default"
    try:
        prompts = read_prompts(options.questions, options.prompts)
        folder = resolve_model(model, lambda said: print(said, file=sys.stderr))  # noqa: T201 - a command's progress
        report = asyncio.run(run(options, folder, display_name(model), prompts))
    except (ModelError, ValueError) as error:
        print(f"drystone check: {error}", file=sys.stderr)  # noqa: T201 - a command's error
        return 1
    if options.json:
        print(json.dumps({**asdict(report), "passed": report.passed}))  # noqa: T201 - a command's output
    else:
        print_report(report)
    return 0 if report.passed else 1


async def run(options: GateOptions, folder: Path, name: str, prompts: list[GatePrompt]) -> GateReport:
    """Compares `prompts` on the model in `folder`."""
    report = GateReport(model=name, prompts=len(prompts), max_new_tokens=options.max_new_tokens)
    exact = Reference(folder, torch.float32)
    if _FLOAT32 in options.dtypes:
        for attention in options.attention:
            report.float32.append(await _float32(options, folder, prompts, exact, attention))
    for dtype in options.dtypes:
        if dtype != _FLOAT32:
            report.others.append(await _other_dtype(folder, prompts, exact, dtype))
    return report


async def _float32(
    options: GateOptions, folder: Path, prompts: list[GatePrompt], exact: Reference, attention: Attention
) -> Float32Report:
    report = Float32Report(attention)
    async with _Subject(folder, _FLOAT32, attention, options.max_new_tokens) as subject:
        for index, prompt in _progress(prompts, f"float32 {attention}"):
            blocks, question, served = await subject.serve(prompt)
            if attention == "full":
                whole = [token for block in (*blocks, question) for token in block]
                run = await asyncio.to_thread(exact.full_generate, whole, options.max_new_tokens)
                blocks, question = [], whole
            else:
                run = await asyncio.to_thread(exact.block_generate, blocks, question, options.max_new_tokens)
            report.add(compare_tokens(index, served, run, exact, blocks, question))
        report.idle_invariant = subject.idle_invariant()
    return report


async def _other_dtype(folder: Path, prompts: list[GatePrompt], exact: Reference, dtype: str) -> DtypeReport:
    own = Reference(folder, getattr(torch, dtype))
    served_distance, own_distance = Distance(), Distance()
    async with _Subject(folder, dtype, "block", max_new_tokens=1) as subject:
        for _, prompt in _progress(prompts, dtype):
            blocks, question, served = await subject.serve(prompt)
            truth = await _question_logits(exact, blocks, question)
            served_distance.add(served.question_logits, truth)
            own_distance.add(await _question_logits(own, blocks, question), truth)
    return DtypeReport(dtype, served_rms=served_distance.rms, reference_rms=own_distance.rms)


async def _question_logits(reference: Reference, blocks: list[list[int]], question: list[int]) -> torch.Tensor:
    run = await asyncio.to_thread(reference.block_generate, blocks, question, 1, keep_question_logits=True)
    if run.question_logits is None:
        raise AssertionError("the reference was asked for question logits")
    return run.question_logits


class _Subject:
    """The service under test, with an eye on the logits of its question rows."""

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
        engine.pool.check_integrity(engine.requests)
        return not engine.requests and not engine.pool.blocks.pins and not len(engine.pool.fetches)

    async def serve(self, prompt: GatePrompt) -> tuple[list[list[int]], list[int], Served]:
        """Token ids of the prompt's blocks and question, as planned, and what was answered."""
        answer = await self._client.generate(
            prompt.question,
            documents=prompt.documents,
            attention=self._attention,
            truncation=Truncation("right"),
            max_new_tokens=self._max_new_tokens,
        )
        # The reference gets the very token ids that reached the engine.
        request = self._requests.pop(answer.request_id)
        sample = answer.samples[0]
        rows = torch.cat(self._rows.pop(answer.request_id))
        served = Served(list(sample.token_ids), sample.matched_stop_token_id, rows)
        return [list(block.token_ids) for block in request.blocks], list(request.question_ids), served


def _progress(prompts: list[GatePrompt], what: str) -> Iterator[tuple[int, GatePrompt]]:
    console = Console(stderr=True)
    yield from track(list(enumerate(prompts)), description=what, console=console, disable=not console.is_terminal)
