"""A gateway's client and a supervisor that keep blocks in a set: enough for the demo's own logic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from drystone import (
    Answer,
    BlockRole,
    BlockSource,
    BlockStats,
    Document,
    FinishReason,
    ModelInfo,
    Routing,
    Sample,
    Timings,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BYTES_PER_BLOCK = 1024


class FakeStack:
    """Encodes each block once. `forgetful` encodes every time; `fickle` never answers the same twice."""

    def __init__(self, *, forgetful: bool = False, fickle: bool = False) -> None:
        self.forgetful = forgetful
        self.fickle = fickle
        self.resident: set[str] = set()
        self.asked: list[tuple[str, tuple[str, ...], str]] = []

    def ask(self, question: str, documents: list[Document], attention: str) -> Answer:
        titles = tuple(document.title for document in documents)
        self.asked.append((question, titles, attention))
        names = ["preamble", *titles] if attention == "block" else [f"full {question}"]
        new = [name for name in names if self.forgetful or attention == "full" or name not in self.resident]
        if attention == "block":
            self.resident |= set(names)
        blocks = [
            BlockStats(
                key=name,
                role=BlockRole.PASSAGE,
                tokens=10,
                offset=0,
                source=BlockSource.ENCODED if name in new else BlockSource.RESIDENT,
            )
            for name in names
        ]
        tokens = (len(self.asked),) if self.fickle else (len(titles),)
        return Answer(
            samples=(Sample(0, f"[It] was {titles[0]}.", tokens, FinishReason.STOP),),
            usage=Usage(
                prompt_tokens=60,
                completion_tokens=1,
                shipped_bytes=len(new) * BYTES_PER_BLOCK,
                blocks_reused=len(names) - len(new),
                blocks_encoded=len(new),
            ),
            timings=Timings(ttft_ms=12.0, total_ms=20.0),
            blocks=(*blocks, BlockStats("", BlockRole.QUESTION, 10, 50, BlockSource.UNSPECIFIED)),
            routing=Routing(),
            request_id="r",
            model="tiny",
            model_fingerprint="f" * 64,
            seed=1,
            attention=attention,
        )


class FakeClient:
    """`drystone.Client` over a FakeStack."""

    def __init__(self, stack: FakeStack) -> None:
        self._stack = stack

    def model(self) -> ModelInfo:
        return ModelInfo("tiny", "f" * 64, "float32", 2048, 64, "chat")

    def generate(self, question: str, *, documents: list[Document], attention: str, **_: Any) -> Answer:
        return self._stack.ask(question, documents, attention)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class FakeSupervisor:
    """`Supervisor` that starts nothing and remembers that it was stopped."""

    stopped = 0
    error: Exception | None = None

    def __init__(self, options: Any, *, report: Callable[[str], None]) -> None:
        self.options = options
        self.report = report
        self.address = "127.0.0.1:1"
        self.description = "model tiny, 1 prefill, 1 decode"

    def prepare(self) -> None:
        self.report("downloading a model")

    def __enter__(self) -> Self:
        self.report("starting prefill-0")
        self.report("[prefill-0] a line of its log")
        if FakeSupervisor.error is not None:
            raise FakeSupervisor.error
        return self

    def __exit__(self, *_: object) -> None:
        FakeSupervisor.stopped += 1
