"""Warming: what a caller asks for and what it gets. Documents are encoded ahead of the requests that use them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from drystone._block_info import BlockLocation
from drystone._prompts import Template


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a long document is cut: chunks of at most `max_tokens` tokens, the same ones every time.

    Args:
        max_tokens: Longest chunk in tokens. 0: documents are not cut.
        overlap_tokens: Tokens that a chunk repeats from the one before.
        at_paragraphs: Prefer to cut at the ends of paragraphs.

    Example:
        >>> drystone.Chunking(512, overlap_tokens=64)
        Chunking(max_tokens=512, overlap_tokens=64, at_paragraphs=True)
    """

    max_tokens: int
    overlap_tokens: int = 0
    at_paragraphs: bool = True


class WarmOptions(TypedDict, total=False):
    """Keywords of `warm`. An absent one takes the server's default.

    Example:
        >>> client.warm(documents, tags=["handbook"], ttl_seconds=7 * 86_400, chunking=drystone.Chunking(512))
    """

    model: str
    # Kept with the documents' records, to find their blocks by; one string is one tag.
    tags: Iterable[str] | str
    # Seconds the records live.
    ttl_seconds: int | None
    # Keep the blocks from eviction.
    pin: bool
    chunking: Chunking | None
    template: Template | str | None
    # Tenant on whose behalf a trusted caller asks.
    tenant: str
    # Seconds for one call, which carries at most 256 documents. Absent: the client's `Timeouts.warm`.
    timeout: float | None


@dataclass(frozen=True, slots=True)
class WarmedDocument:
    """One document after warming: the keys of its blocks in order, or why it failed.

    `index` is its place in the documents given, from 0; `tokens` counts all its blocks; `error_reason` is stable
    (docs/errors.md). Each key stands for its block in a prompt: `drystone.Document(key=...)`.

    Example:
        >>> result = client.warm(["A wall without mortar."]).result()
        >>> client.generate("What is it?", documents=[drystone.Document(key=result.documents[0].keys[0])])
    """

    index: int
    keys: tuple[str, ...] = ()
    tokens: int = 0
    already_warm: bool = False
    error: str = ""
    error_reason: str = ""

    @property
    def failed(self) -> bool:
        """True when it was not warmed."""
        return bool(self.error or self.error_reason)

    def __repr__(self) -> str:
        """Place, and either keys and size or the error."""
        if self.failed:
            return f"WarmedDocument({self.index}, failed: {self.error} [{self.error_reason or '-'}])"
        keys = ", ".join(f"{key[:12]}…" for key in self.keys)
        return f"WarmedDocument({self.index}, {keys or 'no blocks'}, {self.tokens} tokens{self._how})"

    @property
    def _how(self) -> str:
        return ", already warm" if self.already_warm else ""


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far warming is, over all calls of one `warm`.

    `documents` are those that were done since the progress before; everything else counts from the start.
    `documents_total` is None while the documents come from an iterator that has not ended. `stored` says where the
    KV of these documents lies: one entry for each place and source, bytes summed.

    Example:
        >>> for progress in client.warm(documents):
        ...     print(f"{progress.documents_done}/{progress.documents_total}: {progress.tokens_encoded} tokens")
    """

    documents_done: int
    documents_total: int | None
    tokens_encoded: int = 0
    bytes_stored: int = 0
    blocks_encoded: int = 0
    documents: tuple[WarmedDocument, ...] = ()
    stored: tuple[BlockLocation, ...] = ()

    def __repr__(self) -> str:
        """The counts that matter."""
        total = "?" if self.documents_total is None else self.documents_total
        return (
            f"WarmProgress({self.documents_done} of {total} documents, {self.tokens_encoded} tokens and "
            f"{self.blocks_encoded} blocks encoded)"
        )


@dataclass(frozen=True, slots=True)
class WarmResult:
    """What warming did. `documents` are in order of index; the other fields are those of the last progress.

    Documents that iteration handed out before `result` was called are counted and not listed again.

    Example:
        >>> result = client.warm(documents).result()
        >>> keys = [document.keys for document in result.documents]
        >>> for document in result.errors:
        ...     print(document.index, document.error)
    """

    documents: tuple[WarmedDocument, ...]
    documents_total: int
    tokens_encoded: int
    bytes_stored: int
    blocks_encoded: int
    stored: tuple[BlockLocation, ...]

    @property
    def errors(self) -> tuple[WarmedDocument, ...]:
        """Documents that were not warmed."""
        return tuple(document for document in self.documents if document.failed)

    @property
    def already_warm(self) -> int:
        """Documents of which nothing had to be encoded."""
        return sum(document.already_warm for document in self.documents)

    def __repr__(self) -> str:
        """The counts that matter."""
        return (
            f"WarmResult({self.documents_total} documents, {self.already_warm} already warm, "
            f"{len(self.errors)} failed, {self.tokens_encoded} tokens and {self.blocks_encoded} blocks encoded)"
        )


def warm_result(documents: Iterable[WarmedDocument], last: WarmProgress) -> WarmResult:
    """The result of a stream that was read to its end.

    Args:
        documents: Those that were read for it, in any order.
        last: Progress at the end.
    """
    return WarmResult(
        documents=tuple(sorted(documents, key=lambda document: document.index)),
        documents_total=last.documents_done,
        tokens_encoded=last.tokens_encoded,
        bytes_stored=last.bytes_stored,
        blocks_encoded=last.blocks_encoded,
        stored=last.stored,
    )
