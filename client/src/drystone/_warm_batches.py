"""Documents as batches, one for each Warm call: bounded in number and in bytes, read only when they are sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from drystone import _requests as requests
from drystone._config import MAX_MESSAGE_BYTES
from drystone._exceptions import InvalidRequestError
from drystone._prompts import Document
from drystone._warming import WarmedDocument, WarmOptions
from drystone.v1 import generation_pb2, prompt_pb2

MAX_BATCH_DOCUMENTS: Final = 256
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
# What one message can carry beside its other fields.
MAX_DOCUMENT_BYTES: Final = MAX_MESSAGE_BYTES - 64 * 1024

_OPTIONS: Final = WarmOptions.__annotations__.keys()


@dataclass(slots=True)
class Batch:
    """Documents of one call, by their place in the whole input, and those that no message could carry."""

    documents: dict[int, prompt_pb2.Document] = field(default_factory=dict)
    refused: list[WarmedDocument] = field(default_factory=list)
    size_bytes: int = 0

    def has_room_for(self, size_bytes: int) -> bool:
        """True when a document of that size may join. A large one goes alone."""
        count = len(self.documents) + len(self.refused)
        return count == 0 or (count < MAX_BATCH_DOCUMENTS and self.size_bytes + size_bytes <= MAX_BATCH_BYTES)


def batches(documents: Iterable[Document | str]) -> Iterator[Batch]:
    """The documents in order, at most one document further read than the batch that was asked for."""
    batch = Batch()
    for index, given in enumerate(documents):
        document, size_bytes = _readable(index, given)
        if not batch.has_room_for(size_bytes):
            yield batch
            batch = Batch()
        if isinstance(document, WarmedDocument):
            batch.refused.append(document)
        else:
            batch.documents[index] = document
            batch.size_bytes += size_bytes
    if batch.documents or batch.refused:
        yield batch


def warm_request(options: WarmOptions) -> generation_pb2.WarmRequest:
    """What every call of one `warm` has, without documents.

    Raises:
        TypeError: On an unknown keyword.
        InvalidRequestError: When a value cannot be carried: out of its type's range, not Unicode.
    """
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    tags, chunking, template = options.get("tags", ()), options.get("chunking"), options.get("template")
    try:
        request = generation_pb2.WarmRequest(
            model=options.get("model", ""),
            tags=[tags] if isinstance(tags, str) else tags,
            ttl_seconds=options.get("ttl_seconds"),
            pin=options.get("pin", False),
            tenant=options.get("tenant", ""),
        )
        if chunking is not None:
            request.chunking.max_tokens = chunking.max_tokens
            request.chunking.overlap_tokens = chunking.overlap_tokens
            request.chunking.at_paragraphs = chunking.at_paragraphs
    except UnicodeError as error:
        raise InvalidRequestError(f"an option is not valid Unicode: {error}", reason="INVALID_UTF8") from error
    except ValueError as error:
        raise InvalidRequestError(f"warm: {error}", reason="INVALID_FIELD") from error
    if template:
        request.template.CopyFrom(requests.template_options(template))
    return request


def _readable(index: int, given: Document | str) -> tuple[prompt_pb2.Document | WarmedDocument, int]:
    """A document for the wire and its bytes there, or why it cannot be sent."""
    try:
        document = requests.document(given)
    except UnicodeError as error:
        refusal = f"the document is not valid Unicode: {error}"
        return WarmedDocument(index, error=refusal, error_reason="INVALID_UTF8"), 0
    size_bytes = document.ByteSize()
    if size_bytes > MAX_DOCUMENT_BYTES:
        refusal = f"the document is too large for one message: limit {MAX_DOCUMENT_BYTES} bytes, value {size_bytes}"
        return WarmedDocument(index, error=refusal, error_reason="DOCUMENT_TOO_LARGE"), 0
    return document, size_bytes
