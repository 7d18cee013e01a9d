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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from drystone.local.gate_prompts import GatePrompt, read_prompts
from drystone.local.gate_report import DtypeReport, Float32Report, GateReport, print_report
from drystone.local.gate_rules import Distance, compare_tokens
from drystone.local.gate_subject import Attention, Subject
from drystone.local.options import GateOptions
from drystone.local.reference import Reference

_FLOAT32 = "float32"
_PROMPTS_PER_LINE = 5
# Of the default model on two cores; to tell people how long to wait.
_SECONDS_PER_PROMPT = 15


def main(options: GateOptions) -> int:
    """Runs the gate and prints its report; 0 when everything is equal, else 1."""
    from shared import logs
    from shared.model.catalog import ModelError, display_name, resolve_model

    logs.configure("error", "console")
    model = options.model or "default"
    try:
        prompts = read_prompts(options.questions, options.prompts)
        _say(_plan(options, display_name(model), len(prompts)))
        folder = resolve_model(model, _say)
        report = asyncio.run(run(options, folder, display_name(model), prompts))
    except (ModelError, ValueError) as error:
        _say(f"drystone check: {error}")
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
    async with Subject(folder, _FLOAT32, attention, options.max_new_tokens) as subject:
        for index, prompt in _progress(prompts, f"float32 {attention}"):
            blocks, question, served = await subject.ask(prompt.question, documents=prompt.documents)
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
    async with Subject(folder, dtype, "block", max_new_tokens=1) as subject:
        for _, prompt in _progress(prompts, dtype):
            blocks, question, served = await subject.ask(prompt.question, documents=prompt.documents)
            truth = await _question_logits(exact, blocks, question)
            served_distance.add(served.question_logits, truth)
            own_distance.add(await _question_logits(own, blocks, question), truth)
    return DtypeReport(dtype, served_rms=served_distance.rms, reference_rms=own_distance.rms)


async def _question_logits(reference: Reference, blocks: list[list[int]], question: list[int]) -> torch.Tensor:
    run = await asyncio.to_thread(reference.block_generate, blocks, question, 1, keep_question_logits=True)
    if run.question_logits is None:
        raise AssertionError("the reference was asked for question logits")
    return run.question_logits


def _progress(prompts: list[GatePrompt], what: str) -> Iterator[tuple[int, GatePrompt]]:
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(list(enumerate(prompts)), description=what, console=console)
        return
    for index, prompt in enumerate(prompts):
        yield index, prompt
        done = index + 1
        if done % _PROMPTS_PER_LINE == 0 or done == len(prompts):
            _say(f"{what}: {done} of {len(prompts)} prompts")


def _plan(options: GateOptions, name: str, prompts: int) -> str:
    """What a check will do, and about how long it takes."""
    parts = [f"{_FLOAT32} {attention}" for attention in options.attention if _FLOAT32 in options.dtypes]
    parts += [dtype for dtype in options.dtypes if dtype != _FLOAT32]
    minutes = max(1, round(prompts * len(parts) * _SECONDS_PER_PROMPT / 60))
    return (
        f"checking model {name}: {prompts} prompts in {', '.join(parts)}; about {minutes} "
        f"minute{'s' if minutes > 1 else ''} on two cores: roughly {_SECONDS_PER_PROMPT} s a prompt and type"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - a command's progress
