"""Warming: documents encoded ahead of requests, a few at a time, each by itself.

    document ──► chunks ──► block keys ──► prefill worker (first in the key's hash order; the next when it fails)
                                               └─► record, copied to the second in the order

What is there already is told apart by the worker and costs no encoding: a call that was cut off is simply made again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field

from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import Document
from drystone.v1.statistics_pb2 import BlockSource
from gateway.accounting import OBJECT_STORE, SOURCES
from gateway.block_warmer import BlockWarmer, WarmedBlock
from gateway.cluster import Cluster
from gateway.planning import Planning, key_space
from gateway.prompt import PromptPlanner, check_chunking
from gateway.stored import token_ids_of
from gateway.tenants import Tenants
from gateway.warm_rules import check_warm
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef
from shared.kv.keys import KeySpace

# An event at most this often, so that a million small documents are not a million messages.
_EVENT_SECONDS = 0.1


@dataclass(slots=True)
class _Progress:
    """What a call has done so far."""

    total: int
    done: int = 0
    tokens_encoded: int = 0
    bytes_encoded: int = 0
    blocks_encoded: int = 0
    stored: Counter[tuple[str, BlockSource.ValueType]] = field(default_factory=Counter)

    def add(self, blocks: list[WarmedBlock]) -> None:
        """Takes a document's blocks in."""
        for block in blocks:
            if block.encoded:
                self.tokens_encoded += block.tokens
                self.bytes_encoded += block.done.bytes
                self.blocks_encoded += 1
            for tier in block.done.tiers:
                source = SOURCES[tier]
                shared = source == BlockSource.BLOCK_SOURCE_OBJECT_STORE
                self.stored[OBJECT_STORE if shared else block.worker_id, source] += block.done.bytes

    def event(self, documents: list[v1.WarmedDocument]) -> v1.WarmResponse:
        """As the client sees it."""
        places = [
            v1.BlockLocation(place=place, source=source, bytes=size)
            for (place, source), size in sorted(self.stored.items())
        ]
        return v1.WarmResponse(
            documents_done=self.done,
            documents_total=self.total,
            tokens_encoded=self.tokens_encoded,
            bytes_stored=self.bytes_encoded,
            documents=documents,
            stored=places,
            blocks_encoded=self.blocks_encoded,
        )


@dataclass(frozen=True, slots=True)
class _Ended:
    """A document that is warm or has failed, and its blocks."""

    document: v1.WarmedDocument
    blocks: list[WarmedBlock]


class Warming:
    """Warms documents for the whole gateway, so many at once however many calls there are.

    Args:
        cluster: The workers.
        planning: Makes planners.
        tenants: Whose blocks are whose.
        concurrency: Documents, and blocks of them, on their way at once.
        max_documents: Documents of one call.
        timeout_seconds: Time of one document, waiting for workers that are full included.
    """

    def __init__(
        self,
        cluster: Cluster,
        planning: Planning,
        tenants: Tenants,
        *,
        concurrency: int,
        max_documents: int,
        timeout_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._planning = planning
        self._tenants = tenants
        self._places = asyncio.Semaphore(concurrency)
        # Blocks that workers were asked for: documents that are cut into thousands of chunks take no more.
        self._blocks = asyncio.Semaphore(concurrency)
        self._max_documents = max_documents
        self._timeout = timeout_seconds
        self._log = logs.get("warming")
        self.documents_total = self.documents_failed_total = 0

    async def warm(self, request: v1.WarmRequest, traceparent: str) -> AsyncGenerator[v1.WarmResponse]:
        """Warms the documents and the template's own preamble; yields progress, each document's end in one event.

        Raises:
            DrystoneError: The call breaks a rule, or no worker is ready.
        """
        check_warm(request, self._max_documents)
        info = self._cluster.info
        if request.HasField("chunking"):
            check_chunking(request.chunking, most_tokens=info.context_tokens)
        if not self._cluster.prefill_workers:
            raise DrystoneError(Reason.NO_PREFILL_WORKER, "no prefill worker is ready", retry_after_ms=1000)
        tenant = self._tenants.named(request.tenant)
        call = _Call(
            request,
            self._planning.planner(info),
            key_space(info.compatibility, tenant.salt),
            BlockWarmer(
                self._cluster,
                info.compatibility,
                request_id=f"warm-{secrets.token_hex(8)}",
                traceparent=traceparent,
                tenant=tenant,
                tags=list(request.tags),
                ttl_seconds=request.ttl_seconds if request.HasField("ttl_seconds") else None,
                pin=request.pin,
                places=self._blocks,
                timeout_seconds=self._timeout,
            ),
        )
        ended: asyncio.Queue[_Ended | None] = asyncio.Queue()
        pump = asyncio.create_task(self._pump(call, ended))
        progress = _Progress(total=len(request.documents))
        try:
            while (first := await ended.get()) is not None:
                batch: list[_Ended | None] = [first]
                while not ended.empty():
                    batch.append(ended.get_nowait())
                yield progress.event([self._count(one, progress) for one in batch if one is not None])
                if None in batch:
                    break
                await asyncio.sleep(_EVENT_SECONDS)
            await pump
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    def _count(self, ended: _Ended, progress: _Progress) -> v1.WarmedDocument:
        self.documents_total += 1
        self.documents_failed_total += bool(ended.document.error)
        progress.done += 1
        progress.add(ended.blocks)
        return ended.document

    async def _pump(self, call: _Call, ended: asyncio.Queue[_Ended | None]) -> None:
        """Keeps as many documents on their way as the gateway allows; None comes last. Cancelled, it cancels them."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._preamble(call))
                for index, document in enumerate(call.request.documents):
                    await self._places.acquire()
                    task = group.create_task(self._document(call, index, document, ended))
                    task.add_done_callback(lambda _: self._places.release())
        finally:
            ended.put_nowait(None)

    async def _document(self, call: _Call, index: int, document: Document, ended: asyncio.Queue[_Ended | None]) -> None:
        warmed, blocks = v1.WarmedDocument(document_index=index), list[WarmedBlock]()
        try:
            async with asyncio.timeout(self._timeout):
                known = await token_ids_of(self._cluster, call.keys, call.named(document))
                pieces = await asyncio.to_thread(call.pieces, index, document, known)
                warmed.block_keys.extend(ref.key.hex() for ref in pieces)
                warmed.tokens = sum(len(ref.token_ids) for ref in pieces)
                blocks = await call.warmer.warm(pieces)
                warmed.already_warm = not any(block.encoded for block in blocks)
        except DrystoneError as error:
            warmed.error, warmed.error_reason = error.message, error.reason
        except TimeoutError:
            warmed.error = f"not warm after {self._timeout:g} s"
            warmed.error_reason = Reason.DEADLINE_EXCEEDED
        except Exception as defect:  # noqa: BLE001 - one document's defect must not end the others of its call
            self._log.error("document_defect", document_index=index, exc_info=defect)
            warmed.error, warmed.error_reason = f"{type(defect).__name__} at the gateway", Reason.INTERNAL
        if warmed.error:
            self._log.warning("document_failed", document_index=index, reason=warmed.error_reason, detail=warmed.error)
        ended.put_nowait(_Ended(warmed, blocks))

    async def _preamble(self, call: _Call) -> None:
        """The template's own preamble stands in every prompt: it is warmed beside the documents, unseen."""
        try:
            async with asyncio.timeout(self._timeout):
                await call.warmer.warm(await asyncio.to_thread(call.preamble), recorded=False)
        except (DrystoneError, TimeoutError) as error:
            self._log.warning("preamble_not_warm", detail=str(error))
        except Exception as defect:  # noqa: BLE001 - documents are warmed whatever becomes of the preamble
            self._log.error("preamble_defect", exc_info=defect)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call, with what all its documents share."""

    request: v1.WarmRequest
    planner: PromptPlanner
    keys: KeySpace
    warmer: BlockWarmer

    @staticmethod
    def named(document: Document) -> list[str]:
        """The key that a document is given as, where it is."""
        return [document.block_key.lower()] if document.HasField("block_key") else []

    def pieces(self, index: int, document: Document, known: Mapping[str, tuple[int, ...]]) -> list[BlockRef]:
        """A document's blocks."""
        chunking = self.request.chunking if self.request.HasField("chunking") else None
        parts = self.planner.document_ids(document, known, field=f"documents[{index}]", chunking=chunking)
        return [self._ref(ids) for ids in parts]

    def preamble(self) -> list[BlockRef]:
        """The preamble's block, where the template has one."""
        return [self._ref(ids) for ids in self.planner.preamble_ids(self.request.template)]

    def _ref(self, ids: tuple[int, ...]) -> BlockRef:
        return BlockRef(key=self.keys.key(ids), token_ids=ids, store=True)
