"""`drystone warm`: a corpus encoded ahead of the questions about it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from drystone import DEFAULT_ADDRESS, Chunking, Client, DrystoneError, WarmOptions
from drystone.cli import ttl as times
from drystone.cli.console import ExitCode, JsonOption, ServerOption, fail, say, telling_errors
from drystone.cli.warm_feed import WarmFeed
from drystone.cli.warm_input import DEFAULT_GLOBS, FilesInput, LinesInput, WarmInput, count_lines
from drystone.cli.warm_report import KeysFile, WarmBar, print_tally, tally_as_json


def warm(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATHS", help="Files, and folders with everything below them.", show_default=False),
    ] = None,
    *,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='Lines of {"title", "text"}, or of objects with "documents": [{"title", "text"}, …].'
        ),
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read such lines from stdin.")] = False,
    glob: Annotated[
        list[str] | None,
        typer.Option(help=f"Files of folders to take; repeat for more. Default: {' '.join(DEFAULT_GLOBS)}."),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Kept with the documents; repeat for more.")] = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long keys stay valid: 7d, 12h, 30m, or seconds.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep the blocks from eviction.")] = False,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut documents into blocks of at most this many tokens.")
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Tokens that a block repeats from the one before.")] = 0,
    at_paragraphs: Annotated[
        bool, typer.Option("--at-paragraphs/--no-at-paragraphs", help="Prefer to cut at the ends of paragraphs.")
    ] = True,
    template: Annotated[str | None, typer.Option(help="chat, tulu, card or plain, as the questions will use.")] = None,
    model: Annotated[str, typer.Option(help="Model name, when the gateway has several.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose documents they are, when you may say so.")] = "",
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add a JSON line of source, title, keys and tokens for each document done."),
    ] = None,
    server: ServerOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Encodes documents ahead, so that questions about them start from stored KV.

    What is stored already is skipped: after an interruption, run it again. Equal documents are sent once.
    A document that fails is named, and the rest is done. Hidden files of folders are left out.

    \b
    Examples:
      drystone warm handbook/ --tag handbook --ttl 30d
      drystone warm --jsonl questions.jsonl --keys keys.jsonl
      drystone warm manual.md --chunk-tokens 512 --overlap 64
      zcat passages.jsonl.gz | drystone warm --stdin --pin

    \b
    Exit codes: 0 all warm, 1 some or all failed, 2 wrong usage, 4 no server, 130 interrupted.
    """  # noqa: D301 - \b keeps the lines of an example apart
    if overlap and chunk_tokens is None:
        fail("--overlap needs --chunk-tokens", ExitCode.USAGE)
    options: WarmOptions = {
        "model": model,
        "tags": tag or (),
        "ttl_seconds": _ttl(ttl),
        "pin": pin,
        "chunking": Chunking(chunk_tokens, overlap, at_paragraphs) if chunk_tokens is not None else None,
        "template": template,
        "tenant": tenant,
    }
    with _opened(paths or [], jsonl, glob, stdin=stdin) as source, _keys(keys) as keys_file:
        _run(WarmFeed(source), keys_file, options, server, as_json=as_json)


def _run(feed: WarmFeed, keys_file: KeysFile, options: WarmOptions, server: str, *, as_json: bool) -> None:
    """Warms, and says what was done however it ends."""
    interrupted = False
    with telling_errors(server):
        try:
            _warm(feed, keys_file, options, server, WarmBar(wanted=not as_json))
        except KeyboardInterrupt:
            interrupted = True
        except DrystoneError:
            if feed.tally.done:
                _print(feed, as_json=as_json, complete=False)
            raise
        except OSError as error:
            _print(feed, as_json=as_json, complete=False)
            fail(f"{error.filename or 'the input or the keys file'}: {error.strerror or error}")
    if not interrupted and not feed.tally.done:
        fail("no documents in the input", ExitCode.USAGE)
    _print(feed, as_json=as_json, complete=not interrupted)
    if interrupted:
        say(
            f"drystone: interrupted, {feed.tally.done} documents are done; "
            "run it again to go on: what is there is skipped"
        )
        raise typer.Exit(ExitCode.INTERRUPTED)
    if feed.tally.failed:
        raise typer.Exit(ExitCode.FAILED)


def _warm(feed: WarmFeed, keys_file: KeysFile, options: WarmOptions, server: str, bar: WarmBar) -> None:
    with bar, Client(server) as client, client.warm(feed, **options) as stream:
        for progress in stream:
            for source, title, document in feed.take(progress):
                keys_file.add(source, title, document)
            bar.update(feed)


def _print(feed: WarmFeed, *, as_json: bool, complete: bool) -> None:
    if as_json:
        print(tally_as_json(feed.tally, complete=complete))
    else:
        print_tally(feed.tally)


@contextmanager
def _opened(paths: list[Path], jsonl: Path | None, globs: list[str] | None, *, stdin: bool) -> Iterator[WarmInput]:
    """The one input that was asked for, open."""
    if sum((bool(paths), jsonl is not None, stdin)) != 1:
        fail("give one of PATHS, --jsonl FILE and --stdin", ExitCode.USAGE)
    if globs and not paths:
        fail("--glob chooses files of folders: it goes with PATHS", ExitCode.USAGE)
    if jsonl is not None:
        try:
            total, lines = count_lines(jsonl), jsonl.open("rb")
        except OSError as error:
            fail(f"{jsonl}: {error.strerror or error}", ExitCode.USAGE)
        with lines:
            yield LinesInput(str(jsonl), lines, total)
    elif stdin:
        yield LinesInput("stdin", sys.stdin.buffer)
    else:
        for path in paths:
            if not path.exists():
                fail(f"{path}: no such file or folder", ExitCode.USAGE)
        yield FilesInput(paths, globs or DEFAULT_GLOBS)


def _keys(path: Path | None) -> KeysFile:
    try:
        return KeysFile(path)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}", ExitCode.USAGE)


def _ttl(text: str | None) -> int | None:
    try:
        return None if text is None else times.seconds(text)
    except ValueError as error:
        fail(f"--ttl: {error}", ExitCode.USAGE)
