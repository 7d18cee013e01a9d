"""`drystone demo`: starts everything here, asks three questions, checks that nothing is encoded twice."""

import collections
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from drystone import Answer, Client, Document, DrystoneError, ModelInfo
from drystone.cli.console import ExitCode, JsonOption, fail, require_server_packages, say
from drystone.cli.demo_report import demo_as_json, print_asked, print_header, print_verdict
from drystone.cli.documents import DocumentFileError, read_document
from drystone.local.demo import MAX_NEW_TOKENS, Asked, Attention, DemoDataError, find_data, load_questions, run_all
from drystone.local.demo import problems as problems_of
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor, SupervisorError

_LAST_LINES = 30
_ANSWER_SECONDS = 120.0


class _Voice:
    """What the user is told while the demo works: a spinner on a terminal, plain lines elsewhere.

    Lines of the processes are kept back, for when something fails.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._status = self._console.status("") if self._console.is_terminal else None

    def tell(self, text: str) -> None:
        """Says what is being done."""
        if self._status is None:
            say(f"{text} ...")
        else:
            self._status.update(text)
            self._status.start()

    def quiet(self) -> None:
        """Takes the spinner away."""
        if self._status is not None:
            self._status.stop()

    def line(self, text: str) -> None:
        """Keeps a line of a process; a slow step of obtaining the model is told at once."""
        if text.startswith(("starting ", "stopping ", "[", "{")):
            self._lines.append(text)
        else:
            self.tell(text)

    def last_lines(self) -> str:
        """The lines kept back."""
        return "\n".join(["last lines of the processes:", *(f"  {line}" for line in self._lines)])


def demo(
    *,
    model: Annotated[str, typer.Option(help="As for `drystone serve`.")] = "default",
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder with questions.json and corpus/. Default: docs/demo."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Starts a gateway, a prefill and a decode worker, and asks three questions over passages.

    Each is asked cold, again, with its passages in another order, and with full attention. The second and third
    run must encode nothing and ship nothing; otherwise the demo fails. Everything is stopped at the end.

    \b
    Examples:
      drystone demo
      drystone demo --model ./Llama-3.2-1B-block-FT --json

    \b
    Exit codes: 0 as promised, 1 not so or failed, 2 wrong usage, 3 server packages not installed.
    """  # noqa: D301 - \b keeps the lines of an example apart
    require_server_packages()
    try:
        questions = load_questions(data or find_data(), read_document)
    except (DemoDataError, DocumentFileError) as error:
        fail(str(error), ExitCode.USAGE)
    voice = _Voice()
    began = time.monotonic()
    asked: list[Asked] = []
    with _telling_failure(voice):
        supervisor = Supervisor(ServeOptions(model=model, port=0), report=voice.line)
        voice.tell("looking for the model")
        supervisor.prepare()
        voice.tell("starting a gateway, a prefill worker and a decode worker")
        with supervisor, Client(supervisor.address) as client:
            served = client.model()
            voice.quiet()
            if not as_json:
                print_header(served, supervisor.description, time.monotonic() - began)
            voice.tell("asking question 1 cold, warm, shuffled and with full attention")
            for entry in run_all(lambda *given: _ask(client, *given), questions):
                asked.append(entry)
                voice.quiet()
                if not as_json:
                    print_asked(len(asked), entry)
                if len(asked) < len(questions):
                    voice.tell(f"asking question {len(asked) + 1}")
    _conclude(served, asked, time.monotonic() - began, default_model=model == "default", as_json=as_json)


def _ask(client: Client, question: str, documents: list[Document], attention: Attention) -> Answer:
    return client.generate(
        question,
        documents=documents,
        attention=attention,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.0,
        timeout=_ANSWER_SECONDS,
    )


def _conclude(served: ModelInfo, asked: list[Asked], seconds: float, *, default_model: bool, as_json: bool) -> None:
    wrong = problems_of(asked)
    if as_json:
        print(demo_as_json(served, asked, wrong, seconds))
    else:
        print_verdict(asked, wrong, seconds, default_model=default_model)
    if wrong:
        raise typer.Exit(ExitCode.FAILED)


@contextmanager
def _telling_failure(voice: _Voice) -> Iterator[None]:
    try:
        yield
    except SupervisorError as error:
        # The message of a process that died has its last lines in it.
        voice.quiet()
        fail(str(error))
    except DrystoneError as error:
        voice.quiet()
        say(voice.last_lines())
        fail(f"{error.message} [{error.reason}]")
    except KeyboardInterrupt:
        voice.quiet()
        fail("stopped", ExitCode.FAILED)
    finally:
        voice.quiet()
        sys.stdout.flush()
