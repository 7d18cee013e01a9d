"""What an answer cost, for people on stderr and for machines as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from drystone import BlockRole

if TYPE_CHECKING:
    from drystone import Answer, BlockSource, BlockStats

_STEP = 1024


def print_summary(answer: Answer) -> None:
    """Blocks and tokens by source, bytes shipped, time to first token, and speed, on stderr."""
    console = Console(stderr=True, highlight=False, markup=False)
    console.print()
    console.print(_sources(answer.blocks))
    usage, timings = answer.usage, answer.timings
    facts = [
        f"KV shipped {human_bytes(usage.shipped_bytes)}",
        f"first token {timings.ttft_ms:.0f} ms",
        f"{usage.completion_tokens} tokens" + (f" at {speed:.1f} tokens/s" if (speed := _speed(answer)) else ""),
        f"ended by {answer.finish_reason}",
    ]
    if answer.truncated_tokens:
        facts.append(f"{answer.truncated_tokens} prompt tokens cut")
    console.print(", ".join(facts), soft_wrap=True)


def answer_as_json(answer: Answer) -> str:
    """The answer as one JSON object; the first sample's text stands at the top."""
    values = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        **dataclasses.asdict(answer),
    }
    return json.dumps(values, ensure_ascii=False, default=_token_text)


def human_bytes(count: float) -> str:
    """A byte count with its binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < _STEP:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} TiB"


def source_label(source: BlockSource) -> str:
    """A source for people."""
    return source.replace("_", " ").replace("ram", "RAM")


def _sources(blocks: tuple[BlockStats, ...]) -> Table:
    counts = Counter[str]()
    tokens = Counter[str]()
    for block in blocks:
        counts[_label(block)] += 1
        tokens[_label(block)] += block.tokens
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("KV from")
    table.add_column("blocks", justify="right")
    table.add_column("tokens", justify="right")
    for label, count in counts.items():
        table.add_row(label, str(count), str(tokens[label]))
    return table


def _label(block: BlockStats) -> str:
    if block.role is BlockRole.QUESTION:
        return "question"
    return source_label(block.source)


def _token_text(token: bytes) -> str:
    """A token's bytes as text; an incomplete UTF-8 sequence becomes replacement characters."""
    return token.decode("utf-8", "replace")


def _speed(answer: Answer) -> float | None:
    """Tokens a second after the first token; None when there is nothing to measure."""
    milliseconds = answer.timings.total_ms - answer.timings.ttft_ms
    tokens = answer.usage.completion_tokens - 1
    return tokens / milliseconds * 1000 if tokens > 0 and milliseconds > 0 else None
