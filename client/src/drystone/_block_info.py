"""Blocks that the cluster knows: which ones a call is about, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypedDict

from drystone import _replies as replies
from drystone._exceptions import InvalidRequestError
from drystone._results import BlockSource
from drystone.v1 import generation_pb2, statistics_pb2


class BlockSelector(TypedDict, total=False):
    """Keywords that say which blocks a call is about. Those that are set must all match.

    Example:
        >>> with drystone.Client() as client:
        ...     client.blocks.pin(tags=["handbook"], tenant="acme")
        41
    """

    # Exact keys, 64 hexadecimal digits each; one string is one key.
    keys: Iterable[str] | str
    # Beginning of a key, in hexadecimal digits.
    key_prefix: str
    # Tags given when the documents were warmed, any of which matches; one string is one tag.
    tags: Iterable[str] | str
    # Tenant on whose behalf a trusted caller asks.
    tenant: str
    # Model name or alias. Empty: the gateway's only model.
    model: str


@dataclass(frozen=True, slots=True)
class BlockLocation:
    """A place that holds KV: a worker or an object store, and the source that a request would name.

    Example:
        >>> drystone.BlockLocation("prefill-0", drystone.BlockSource.PREFILL_DISK, 4 << 20)
        BlockLocation(prefill-0 prefill_disk, 4194304 bytes)
    """

    place: str
    source: BlockSource
    bytes: int

    def __repr__(self) -> str:
        """Place, source and size."""
        return f"BlockLocation({self.place} {self.source}, {self.bytes} bytes)"


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block as the cluster knows it.

    `tokens` and `hits` are counts, `idle_seconds` the time since its last use, `ttl_seconds` the time until its
    record ends (None: it does not). `recorded` means that its key stays valid without its KV.

    Example:
        >>> with drystone.Client() as client:
        ...     for block in client.blocks.list(tags="handbook"):
        ...         print(block.key, block.tokens, block.bytes)
    """

    key: str
    tokens: int
    locations: tuple[BlockLocation, ...] = ()
    hits: int = 0
    idle_seconds: float = 0.0
    pinned: bool = False
    tags: tuple[str, ...] = ()
    ttl_seconds: int | None = None
    tenant: str = ""
    recorded: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of it over all places."""
        return sum(location.bytes for location in self.locations)

    def __repr__(self) -> str:
        """Key, size and places in one line."""
        places = ", ".join(location.place for location in self.locations) or "nowhere"
        pinned = ", pinned" if self.pinned else ""
        return f"BlockInfo({self.key[:12]}…, {self.tokens} tokens, {self.bytes} bytes, in {places}{pinned})"


@dataclass(frozen=True, slots=True)
class DeletedBlocks:
    """What a deletion did: blocks removed, and bytes freed over all tiers and workers.

    Example:
        >>> with drystone.Client() as client:
        ...     client.blocks.delete(tags="handbook")
        DeletedBlocks(blocks=41, bytes_freed=193462272)
    """

    blocks: int
    bytes_freed: int


def selector(options: BlockSelector) -> generation_pb2.BlockSelector:
    """The selector for the wire.

    Raises:
        TypeError: On an unknown keyword.
        InvalidRequestError: When a value is not Unicode.
    """
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    try:
        return generation_pb2.BlockSelector(
            model=options.get("model", ""),
            block_keys=_strings(options.get("keys", ())),
            key_prefix=options.get("key_prefix", ""),
            tags=_strings(options.get("tags", ())),
            tenant=options.get("tenant", ""),
        )
    except UnicodeError as error:
        raise InvalidRequestError(f"the selector is not valid Unicode: {error}", reason="INVALID_UTF8") from error


def page_request(page_size: int, page_token: str, options: BlockSelector) -> generation_pb2.DescribeBlocksRequest:
    """The request for one page of descriptions."""
    return generation_pb2.DescribeBlocksRequest(selector=selector(options), page_size=page_size, page_token=page_token)


def block_info(block: generation_pb2.BlockDescription) -> BlockInfo:
    """One description as a caller gets it."""
    return BlockInfo(
        key=block.block_key,
        tokens=block.tokens,
        locations=tuple(map(location, block.locations)),
        hits=block.hits,
        idle_seconds=block.idle_ms / 1000,
        pinned=block.pinned,
        tags=tuple(block.tags),
        ttl_seconds=block.ttl_seconds if block.HasField("ttl_seconds") else None,
        tenant=block.tenant,
        recorded=block.recorded,
    )


def location(found: generation_pb2.BlockLocation) -> BlockLocation:
    """One place as a caller gets it."""
    source = replies.enum_name(statistics_pb2.BlockSource, "BLOCK_SOURCE_", found.source)
    return BlockLocation(found.place, BlockSource(source), found.bytes)


_OPTIONS: Final = BlockSelector.__annotations__.keys()


def _strings(given: Iterable[str] | str) -> list[str]:
    return [given] if isinstance(given, str) else list(given)
