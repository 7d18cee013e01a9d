"""Rules on a `WarmRequest`. One bad document is its own affair; anything else refuses the call."""

from __future__ import annotations

from collections.abc import Sequence

from drystone.v1.generation_pb2 import WarmRequest
from gateway.tenants import check_tenant
from shared.errors import InvalidRequestError, Reason

MAX_TAGS = 32
MAX_TAG_CHARACTERS = 128


def check_warm(request: WarmRequest, max_documents: int) -> None:
    """Refuses a call that breaks a rule; documents and chunking are looked at one by one later.

    Raises:
        InvalidRequestError: Names the field, the limit and the value.
    """
    if not request.documents:
        raise InvalidRequestError(Reason.NO_DOCUMENTS, "documents", "has no document")
    if len(request.documents) > max_documents:
        raise InvalidRequestError(
            Reason.TOO_MANY_DOCUMENTS,
            "documents",
            "has too many entries; send them in several calls",
            limit=max_documents,
            value=len(request.documents),
        )
    check_tags(request.tags)
    if request.HasField("ttl_seconds") and not request.ttl_seconds:
        raise InvalidRequestError(
            Reason.INVALID_FIELD, "ttl_seconds", "must be at least 1; leave it out for ever", limit=">= 1", value=0
        )
    check_tenant(request.tenant)


def check_tags(tags: Sequence[str], field: str = "tags") -> None:
    """Refuses tags that are too many, too long, empty, or not printable."""
    if len(tags) > MAX_TAGS:
        raise InvalidRequestError(Reason.INVALID_FIELD, field, "has too many entries", limit=MAX_TAGS, value=len(tags))
    for index, tag in enumerate(tags):
        if not 0 < len(tag) <= MAX_TAG_CHARACTERS or not tag.isprintable():
            raise InvalidRequestError(
                Reason.INVALID_FIELD,
                f"{field}[{index}]",
                "must be printable and of a length in range",
                limit=f"1 to {MAX_TAG_CHARACTERS} characters",
                value=repr(tag[:80]),
            )
