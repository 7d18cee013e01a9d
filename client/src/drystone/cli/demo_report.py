"""What the demo prints: answers side by side, then one table of figures."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drystone.cli.summary import human_bytes
from drystone.local.demo import RunKind, as_dict

if TYPE_CHECKING:
    from drystone import ModelInfo
    from drystone.local.demo import Asked, Run

_WIDTH_WHEN_PIPED = 110
_HEADINGS = {
    RunKind.COLD: "block attention, cold",
    RunKind.SHUFFLED: "block attention, shuffled",
    RunKind.FULL: "full attention",
}
_NOT_TUNED = (
    "SmolLM2-135M is not fine-tuned for block attention, and is small: block answers may be worse than full ones, and "
    "another order of the passages may cost it the answer, with full attention too. The demo shows what is reused, "
    "not how well it answers. For quality serve a model fine-tuned for block attention: drystone demo --model FOLDER."
)


def print_header(served: ModelInfo, description: str, seconds: float) -> None:
    """What runs."""
    console = _console()
    console.print(f"Drystone demo: {description}, KV in {served.dtype}", soft_wrap=True)
    console.print(f"ready after {seconds:.1f} s; every answer is greedy")


def print_asked(number: int, entry: Asked) -> None:
    """A question and its answers side by side."""
    console = _console()
    console.print()
    console.print(Text(f"{number}. {entry.question.text}", style="bold"))
    beside = [run for run in entry.runs if run.kind in _HEADINGS]
    for run in beside[:2]:
        console.print(Text(f"   {run.kind}: {', '.join(run.passages)}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for run in beside:
        table.add_column(_HEADINGS[run.kind], ratio=1)
    table.add_row(*(Text(" ".join(run.answer.text.split())) for run in beside))
    console.print(table)


def print_verdict(asked: list[Asked], wrong: list[str], seconds: float, *, default_model: bool) -> None:
    """The table of figures, and whether the promise was kept."""
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("question")
    table.add_column("run")
    for heading in ("prompt\ntokens", "blocks\nencoded", "blocks\nreused", "KV\nshipped", "first token\nms"):
        table.add_column(heading, justify="right")
    table.add_column("expected\nin answer")
    for number, entry in enumerate(asked, 1):
        for run in entry.runs:
            table.add_row(*_figures(number, entry, run), end_section=run is entry.runs[-1])
    console.print()
    console.print(table)
    if wrong:
        console.print("NOT as promised:")
        for line in wrong:
            console.print(Text(f"  {line}"), soft_wrap=True)
    else:
        console.print(
            f"As promised: in all {len(asked)} questions the warm and the shuffled run encoded 0 blocks and shipped "
            "0 bytes, and the warm answer equals the cold one token for token."
        )
    if default_model:
        console.print(_NOT_TUNED)
    console.print(f"Everything stopped after {seconds:.1f} s.")


def demo_as_json(served: ModelInfo, asked: list[Asked], wrong: list[str], seconds: float) -> str:
    """All of it as one JSON object."""
    values = {
        "model": served.name,
        "model_fingerprint": served.fingerprint,
        "dtype": served.dtype,
        "kv_bytes_per_token": served.kv_bytes_per_token,
        "ok": not wrong,
        "problems": wrong,
        "seconds": round(seconds, 1),
        "questions": as_dict(asked),
    }
    return json.dumps(values, ensure_ascii=False)


def _figures(number: int, entry: Asked, run: Run) -> list[str]:
    usage = run.answer.usage
    return [
        str(number) if run.kind is RunKind.COLD else "",
        str(run.kind),
        str(usage.prompt_tokens),
        str(usage.blocks_encoded),
        str(usage.blocks_reused),
        human_bytes(usage.shipped_bytes),
        f"{run.answer.timings.ttft_ms:.0f}",
        "yes" if entry.found(run) else "no",
    ]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WHEN_PIPED, highlight=False, markup=False)
