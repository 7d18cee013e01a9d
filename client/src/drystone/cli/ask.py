"""`drystone ask`: one question over files, answered as a stream."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drystone import DEFAULT_ADDRESS, Answer, Client, Document, GenerateOptions, Stream, TextDelta
from drystone.cli.console import ExitCode, JsonOption, ServerOption, fail, say, telling_errors
from drystone.cli.documents import DocumentFileError, read_document
from drystone.cli.summary import answer_as_json, print_summary

_TOO_LONG_HINT = {"PROMPT_TOO_LONG": "use --truncation left or right"}


class Attention(StrEnum):
    """Names of the two ways in which blocks see each other."""

    BLOCK = "block"
    FULL = "full"


class Truncation(StrEnum):
    """What gives way when a prompt is too long."""

    REFUSE = "refuse"
    LEFT = "left"
    RIGHT = "right"


def ask(
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    *,
    document: Annotated[
        list[Path] | None,
        typer.Option("--document", "-d", metavar="FILE", help="A UTF-8 file to read; repeat for more, in this order."),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", "-k", metavar="KEY", help="Key of a block that was warmed, after the files; repeat for more."
        ),
    ] = None,
    tenant: Annotated[str, typer.Option(help="Tenant whose blocks are used.")] = "",
    attention: Annotated[
        Attention | None,
        typer.Option(help="block: each file sees only itself, and its KV is kept; full: ordinary attention."),
    ] = None,
    truncation: Annotated[
        Truncation,
        typer.Option(help="When the prompt is too long: refuse it, or drop its front (left) or its end (right)."),
    ] = Truncation.REFUSE,
    server: ServerOption = DEFAULT_ADDRESS,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy, the default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draws.")] = None,
    model: Annotated[str, typer.Option(help="Model name, when the gateway has several.")] = "",
    template: Annotated[str | None, typer.Option(help="chat, tulu, card or plain.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Asks one question over files and streams the answer to stdout; figures follow on stderr.

    A first line "# Title" is a file's title; otherwise its name is.

    \b
    Examples:
      drystone ask -d walls.md -d mortar.md "What holds a dry-stone wall together?"
      drystone ask -d walls.md --attention full --json "Who builds them?"
      drystone ask -k 8aeb5152ed14... "Who builds them?"
      drystone ask "What is a dry-stone wall?"

    \b
    Exit codes: 0 answered, 1 refused or failed, 2 wrong usage or unusable file, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    options: GenerateOptions = {
        "model": model,
        "tenant": tenant,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "template": template,
        "truncation": truncation.value,
        "attention": "full" if attention is Attention.FULL or not (document or key) else "block",
    }
    if not _is_unicode(question):
        fail("the question is not UTF-8 text", ExitCode.USAGE)
    with (
        telling_errors(server, _TOO_LONG_HINT if truncation is Truncation.REFUSE else None),
        Client(server) as client,
        _open(client, question, document or [], key or [], attention, options) as stream,
    ):
        answer = stream.read() if as_json else _print_as_it_comes(stream)
    if as_json:
        print(answer_as_json(answer))
    else:
        print_summary(answer)


def _open(
    client: Client,
    question: str,
    files: list[Path],
    keys: list[str],
    attention: Attention | None,
    options: GenerateOptions,
) -> Stream:
    if files or keys:
        try:
            named = (Document(key=key) for key in keys)
            options["documents"] = [*(read_document(path) for path in files), *named]
        except DocumentFileError as error:
            fail(str(error), ExitCode.USAGE)
        return client.stream(question, **options)
    if attention is Attention.BLOCK:
        fail("--attention block needs documents; give them with -d FILE or -k KEY", ExitCode.USAGE)
    say("no documents: asking as a chat, with full attention")
    options["messages"] = [{"role": "user", "content": question}]
    return client.stream(**options)


def _print_as_it_comes(stream: Stream) -> Answer:
    for event in stream:
        if isinstance(event, TextDelta):
            _write(event.text)
    _write("\n")
    return stream.read()


def _write(text: str) -> None:
    """Writes text as far as the terminal can show it."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _is_unicode(text: str) -> bool:
    """False for arguments that Python could only keep as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
