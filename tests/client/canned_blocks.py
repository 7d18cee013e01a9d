"""Warming and stored blocks as a gateway would serve them, over a dictionary."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from google.rpc import status_pb2
from grpc_status import rpc_status

from drystone.v1 import generation_pb2, generation_pb2_grpc, prompt_pb2, statistics_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BYTES_PER_TOKEN = 100
PAGE_SIZE = 3


@dataclass
class Fault:
    """What goes wrong with one call of Warm, after some of its documents."""

    after: int = 0
    # Status to fail with. None: see `then`.
    status: status_pb2.Status | None = None
    # Without a status: "hold" until the client goes away, or "end" as if all were done.
    then: str = "hold"


@dataclass
class Stored:
    """One block and what the selector asks of it."""

    tokens: int
    tenant: str
    tags: list[str]
    ttl_seconds: int | None
    pinned: bool


@dataclass
class WarmLog:
    """What came to Warm.

    Attributes:
        requests: Calls received.
        faults: What goes wrong, a call at a time.
        errors: Reasons to refuse documents with, by text.
        encoded: Keys encoded, in order; one that stands twice was encoded twice.
        reached: Set when a fault that holds has been reached.
        left: Set when a call has ended before all of its documents were done.
    """

    requests: list[generation_pb2.WarmRequest] = field(default_factory=list)
    faults: deque[Fault | None] = field(default_factory=deque)
    errors: dict[str, str] = field(default_factory=dict)
    encoded: list[str] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)


class CannedBlocks(generation_pb2_grpc.GenerationServicer):
    """Keys are digests of tenant, title and text; a token is a word; documents are done last first.

    Attributes:
        stored: Blocks, by key.
        warmed: What came to Warm.
        selectors: Selectors received, of every call.
        refusal: How the deletion of everything is refused.
    """

    def __init__(self, refusal: Callable[[str], status_pb2.Status]) -> None:
        self.stored: dict[str, Stored] = {}
        self.warmed = WarmLog()
        self.selectors: list[generation_pb2.BlockSelector] = []
        self.refusal = refusal

    def Warm(self, request: generation_pb2.WarmRequest, context: Any) -> Iterator[Any]:  # noqa: N802 - gRPC's name
        self.warmed.requests.append(request)
        fault = self.warmed.faults.popleft() if self.warmed.faults else None
        gone, completed = threading.Event(), False

        def on_end() -> None:
            gone.set()
            if not completed:
                self.warmed.left.set()

        context.add_callback(on_end)
        total = generation_pb2.WarmResponse(documents_total=len(request.documents))
        for done, index in enumerate(reversed(range(len(request.documents)))):
            if fault is not None and fault.after == done:
                if fault.status is not None:
                    context.abort_with_status(rpc_status.to_status(fault.status))
                if fault.then == "hold":
                    self.warmed.reached.set()
                    gone.wait(20)
                return
            yield self._warm_one(request, index, total)
        completed = True

    def DescribeBlocks(self, request: generation_pb2.DescribeBlocksRequest, context: Any) -> Any:  # noqa: N802
        del context
        keys = sorted(self._selected(request.selector))
        first = int(request.page_token or 0)
        last = first + (request.page_size or PAGE_SIZE)
        return generation_pb2.DescribeBlocksResponse(
            blocks=[self._described(key) for key in keys[first:last]],
            next_page_token=str(last) if last < len(keys) else "",
        )

    def PinBlocks(self, request: generation_pb2.PinBlocksRequest, context: Any) -> Any:  # noqa: N802
        del context
        changed = [key for key in self._selected(request.selector) if self.stored[key].pinned == request.unpin]
        for key in changed:
            self.stored[key].pinned = not request.unpin
        return generation_pb2.PinBlocksResponse(blocks_changed=len(changed))

    def DeleteBlocks(self, request: generation_pb2.DeleteBlocksRequest, context: Any) -> Any:  # noqa: N802
        selector = request.selector
        keys = self._selected(selector)
        if not (selector.block_keys or selector.key_prefix or selector.tags or selector.tenant):
            context.abort_with_status(rpc_status.to_status(self.refusal("this selects every block")))
        tokens = sum(self.stored.pop(key).tokens for key in keys)
        return generation_pb2.DeleteBlocksResponse(blocks_deleted=len(keys), bytes_freed=tokens * BYTES_PER_TOKEN)

    def _warm_one(
        self, request: generation_pb2.WarmRequest, index: int, total: generation_pb2.WarmResponse
    ) -> generation_pb2.WarmResponse:
        document, warmed = request.documents[index], generation_pb2.WarmedDocument(document_index=index)
        total.documents_done += 1
        if not document.text:
            warmed.error, warmed.error_reason = "the document has no text", "EMPTY_DOCUMENT"
        elif reason := self.warmed.errors.get(document.text):
            warmed.error, warmed.error_reason = "refused", reason
        else:
            key, tokens = key_of(document, request.tenant), len(document.text.split())
            warmed.block_keys.append(key)
            warmed.tokens, warmed.already_warm = tokens, key in self.stored
            if key not in self.stored:
                ttl = request.ttl_seconds if request.HasField("ttl_seconds") else None
                self.stored[key] = Stored(tokens, request.tenant, list(request.tags), ttl, request.pin)
                self.warmed.encoded.append(key)
                total.tokens_encoded += tokens
                total.blocks_encoded += 1
                total.bytes_stored += tokens * BYTES_PER_TOKEN
            place = total.stored[0] if total.stored else total.stored.add(place="prefill-0")
            place.source = statistics_pb2.BLOCK_SOURCE_PREFILL_DISK
            place.bytes += tokens * BYTES_PER_TOKEN
        response = generation_pb2.WarmResponse(documents=[warmed])
        response.MergeFrom(total)
        return response

    def _selected(self, selector: generation_pb2.BlockSelector) -> list[str]:
        self.selectors.append(selector)
        return [
            key
            for key, block in self.stored.items()
            if (not selector.block_keys or key in selector.block_keys)
            and key.startswith(selector.key_prefix)
            and (not selector.tags or set(selector.tags) & set(block.tags))
            and (not selector.tenant or selector.tenant == block.tenant)
        ]

    def _described(self, key: str) -> generation_pb2.BlockDescription:
        block = self.stored[key]
        source, size = statistics_pb2.BLOCK_SOURCE_PREFILL_DISK, block.tokens * BYTES_PER_TOKEN
        return generation_pb2.BlockDescription(
            block_key=key,
            tokens=block.tokens,
            locations=[generation_pb2.BlockLocation(place="prefill-0", source=source, bytes=size)],
            hits=2,
            idle_ms=90_500,
            pinned=block.pinned,
            tags=block.tags,
            ttl_seconds=block.ttl_seconds,
            tenant=block.tenant,
            recorded=True,
        )


def key_of(document: prompt_pb2.Document, tenant: str = "") -> str:
    """The key that a document gets here."""
    return hashlib.sha256(f"{tenant}\x00{document.title}\x00{document.text}".encode()).hexdigest()
