"""What `drystone warm` shows: a bar while it runs, keys as documents finish, and the sums at the end."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from drystone.cli.console import say
from drystone.cli.summary import human_bytes, source_label
from drystone.cli.warm_feed import Tally, WarmFeed

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from drystone import WarmedDocument


class WarmBar:
    """Documents, their rate and the time left on stderr; nothing where stderr is no terminal.

    Args:
        wanted: False shows nothing anywhere.
    """

    def __init__(self, *, wanted: bool) -> None:
        console = Console(stderr=True, highlight=False, markup=False)
        self._progress = Progress(
            TextColumn("warming"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("documents, {task.fields[speed]:.0f} tokens/s,", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not (wanted and console.is_terminal),
        )
        self._task = self._progress.add_task("warming", total=None, speed=0.0)
        self._began = time.monotonic()

    def update(self, feed: WarmFeed) -> None:
        """Shows how far it is."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        speed = feed.tally.last.tokens_encoded / seconds
        self._progress.update(self._task, completed=feed.tally.done, total=feed.expected, speed=speed)

    def __enter__(self) -> Self:
        """The bar, shown."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes it off the terminal."""
        self._progress.stop()


class KeysFile:
    """JSON Lines of source, title, keys and tokens, one for each document, written as the document finishes.

    Lines are added to what is there, so that a run that goes on from an interrupted one loses nothing.
    """

    def __init__(self, path: Path | None) -> None:
        # One write for each line: what has been reported is in the file, however the command ends.
        self._file: IO[str] | None = path.open("a", encoding="utf-8", buffering=1) if path else None

    def add(self, source: str, title: str, document: WarmedDocument) -> None:
        """Writes one document."""
        if self._file is not None:
            line = {"source": source, "title": title, "keys": document.keys, "tokens": document.tokens}
            self._file.write(json.dumps(line) + "\n")

    def __enter__(self) -> Self:
        """The file, open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        if self._file is not None:
            self._file.close()


def print_tally(tally: Tally) -> None:
    """The sums on stdout, the failures on stderr."""
    console = Console(highlight=False, markup=False)
    console.print(_sums(tally))
    if tally.last.stored:
        console.print(_places(tally))
    for failure in tally.failures:
        reason = f" [{failure.reason}]" if failure.reason else ""
        say(f"{failure.source}: {failure.error}{reason}")
    if more := tally.failed - len(tally.failures):
        say(f"and {more} more that failed")


def tally_as_json(tally: Tally, *, complete: bool) -> str:
    """The sums as one JSON object; `complete` says that the input was read to its end."""
    values = {
        "documents": tally.done,
        "already_warm": tally.already_warm,
        "encoded": tally.encoded,
        "equal": tally.equal,
        "failed": tally.failed,
        "blocks": tally.blocks,
        "blocks_encoded": tally.last.blocks_encoded,
        "tokens": tally.tokens,
        "tokens_encoded": tally.last.tokens_encoded,
        "bytes_stored": tally.last.bytes_stored,
        "stored": [dataclasses.asdict(place) for place in tally.last.stored],
        "errors": [dataclasses.asdict(failure) for failure in tally.failures],
        "complete": complete,
    }
    return json.dumps(values, ensure_ascii=False)


def _sums(tally: Tally) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("documents")
    table.add_column("", justify="right")
    rows = {
        "already there": tally.already_warm,
        "encoded": tally.encoded,
        "equal to another": tally.equal,
        "failed": tally.failed,
        "all": tally.done,
    }
    for label, count in rows.items():
        table.add_row(label, str(count))
    table.add_section()
    table.add_row("blocks", f"{tally.blocks}, of which {tally.last.blocks_encoded} encoded")
    table.add_row("tokens", f"{tally.tokens}, of which {tally.last.tokens_encoded} encoded")
    table.add_row("KV encoded", human_bytes(tally.last.bytes_stored))
    return table


def _places(tally: Tally) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("KV was kept in")
    table.add_column("as")
    table.add_column("bytes", justify="right")
    for place in tally.last.stored:
        table.add_row(place.place, source_label(place.source), human_bytes(place.bytes))
    return table
