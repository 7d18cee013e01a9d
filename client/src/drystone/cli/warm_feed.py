"""Gives the input's documents to the SDK one at a time, and remembers where those on their way came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from drystone import Document, WarmedDocument, WarmProgress
from drystone.cli.warm_input import WarmInput

SHOWN_ERRORS = 20


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that was not warmed."""

    source: str
    error: str
    reason: str = ""


@dataclass(slots=True)
class Tally:
    """What has become of the input so far. `done` counts documents of every fate."""

    already_warm: int = 0
    encoded: int = 0
    equal: int = 0
    failed: int = 0
    blocks: int = 0
    tokens: int = 0
    failures: list[Failure] = field(default_factory=list)
    last: WarmProgress = field(default_factory=lambda: WarmProgress(0, None))

    @property
    def done(self) -> int:
        """Documents that need nothing more."""
        return self.already_warm + self.encoded + self.equal + self.failed

    def fail(self, failure: Failure) -> None:
        """Counts a failure, and keeps the first ones."""
        self.failed += 1
        if len(self.failures) < SHOWN_ERRORS:
            self.failures.append(failure)


class WarmFeed:
    """The input as the SDK reads it. Equal documents are given once; what is unusable counts as failed.

    Memory: a digest of 16 bytes for each different document, and the sources of those on their way.
    """

    def __init__(self, source: WarmInput) -> None:
        self.tally = Tally()
        self._input = source
        self._read = 0
        self._units_read = 0
        self._digests: set[bytes] = set()
        # Source and title of what the SDK has taken and not reported, by its index there.
        self._on_their_way: dict[int, tuple[str, str]] = {}

    def __iter__(self) -> Iterator[Document]:
        """Documents in order, without those that are equal to an earlier one."""
        given = 0
        for unit in self._input.units():
            for found in unit:
                self._read += 1
                if found.document is None:
                    self.tally.fail(Failure(found.source, found.error))
                elif (digest := _digest(found.document)) in self._digests:
                    self.tally.equal += 1
                else:
                    self._digests.add(digest)
                    self._on_their_way[given] = found.source, found.document.title
                    given += 1
                    yield found.document
            self._units_read += 1

    @property
    def expected(self) -> int | None:
        """Documents of the whole input: as many in each unread file or line as in those that were read."""
        total = self._input.units_total
        if total is None or not self._units_read:
            return None
        return max(self._read, round(self._read / self._units_read * total))

    def take(self, progress: WarmProgress) -> Iterator[tuple[str, str, WarmedDocument]]:
        """Counts what was done; gives source and title of each document that was warmed."""
        self.tally.last = progress
        for document in progress.documents:
            source, title = self._on_their_way.pop(document.index)
            if document.failed:
                self.tally.fail(Failure(source, document.error, document.error_reason))
                continue
            if document.already_warm:
                self.tally.already_warm += 1
            else:
                self.tally.encoded += 1
            self.tally.blocks += len(document.keys)
            self.tally.tokens += document.tokens
            yield source, title, document


def _digest(document: Document) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (document.title, document.text):
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()
