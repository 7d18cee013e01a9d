"""Sealed tails: KV of earlier questions and answers, found again by what comes before them.

A segment's KV depends on every block before it, in order, and on every token of the tail up to it. So its
key is chained: the root stands for the blocks, and each segment's key for its parent's and its own tokens.

    root(salt, block keys) ── seg(64 tokens) ── seg(64 tokens) ── seg(17 tokens)       first turn
                                          └──── seg(64 tokens) ── ...                  another second turn

Segments are entries of the block table: pinned while used, evicted by the same policy. A chain's leaves come to
rest before what they follow, and what follows an evicted segment goes with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from decode_worker.blocks import Block, BlockTable, Pin
from decode_worker.tail import SEGMENT_TOKENS, Tail
from shared.kv.tails import segment_key

# Children of one segment that are looked through for the longest common beginning: the newest. A whole segment is
# found by its key whatever their number.
_MOST_COMPARED = 64


@dataclass(frozen=True, slots=True)
class _Segment:
    parent: bytes
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a question is there already.

    Attributes:
        full: Whole segments, in order.
        partial: A segment whose first `tokens_of_partial` tokens come next; None when there is none.
    """

    full: list[Block] = field(default_factory=list)
    partial: Block | None = None
    tokens_of_partial: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the question whose KV need not be computed."""
        return len(self.full) * SEGMENT_TOKENS + self.tokens_of_partial

    @property
    def keys(self) -> set[bytes]:
        """Every segment that it needs."""
        return {block.key for block in [*self.full, *([self.partial] if self.partial else [])]}


class SealedTails:
    """Index over the sealed segments of a block table."""

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._segments: dict[bytes, _Segment] = {}
        self._children: dict[bytes, dict[bytes, None]] = {}
        # Keys of the blocks that a root with children stands for.
        self._over: dict[bytes, frozenset[bytes]] = {}
        table.listeners.append(self._removed)

    def __len__(self) -> int:
        return len(self._segments)

    def match(self, root: bytes, tokens: Sequence[int]) -> Match:
        """The longest beginning of `tokens` that is sealed under `root`; nothing is held."""
        full: list[Block] = []
        parent, at = root, 0
        while at < len(tokens):
            wanted = tuple(tokens[at : at + SEGMENT_TOKENS])
            key = segment_key(parent, wanted)
            block = self._table.find(key) if len(wanted) == SEGMENT_TOKENS and key in self._segments else None
            if block is None:
                return self._with_partial(full, parent, wanted)
            full.append(block)
            parent, at = key, at + SEGMENT_TOKENS
        return Match(full)

    def _with_partial(self, full: list[Block], parent: bytes, wanted: Sequence[int]) -> Match:
        best, longest = None, 0
        for key in self._newest(parent):
            common = _common_prefix(self._segments[key].tokens, wanted)
            if common > longest:
                best, longest = self._table.find(key), common
        return Match(full, best, longest if best is not None else 0)

    def share(self, root: bytes, tokens: Sequence[int], tail: Tail, *, keep: bool) -> list[Pin]:
        """Turns the tail's own full segments into held ones, so that other samples may hold them too.

        Args:
            root: Of the tail's blocks.
            tokens: Tokens whose KV the tail holds.
            tail: Goes on holding what it owned.
            keep: Findable by later requests, and kept after the last sample's end.

        Returns:
            The pins of all full segments, which the tail still owns.
        """
        parent = root
        for index in range(len(tokens) // SEGMENT_TOKENS):
            part = tuple(tokens[index * SEGMENT_TOKENS : (index + 1) * SEGMENT_TOKENS])
            key = segment_key(parent, part)
            if index >= len(tail.held):
                # A twin that was sealed meanwhile stays; ours then lives as long as its samples.
                own = keep and key not in self._table
                name = key if own else secrets.token_bytes(len(key))
                block = self._table.add(name, tail.own.pop(0), store=own, segment=True)
                tail.held.append(Pin(self._table, block))
                if own:
                    self._index(key, parent, part)
            parent = key
        return tail.held

    def seal(self, root: bytes, tokens: Sequence[int], tail: Tail) -> list[bytes]:
        """Keeps the tail's segments for later requests; the tail is closed.

        Returns:
            Keys of the chain's segments that are kept.
        """
        keys, parent = [], root
        fresh: list[tuple[bytes, bytes, tuple[int, ...], int]] = []
        for index in range(-(-len(tokens) // SEGMENT_TOKENS)):
            part = tuple(tokens[index * SEGMENT_TOKENS : (index + 1) * SEGMENT_TOKENS])
            key = segment_key(parent, part)
            if index >= len(tail.held) and key not in self._table:
                fresh.append((key, parent, part, index - len(tail.held)))
            keys.append(key)
            parent = key
        kept = [index for *_, index in fresh]
        # Leaves first: they rest longest when the policy looks for who goes.
        for key, parent, part, index in reversed(fresh):
            self._drop_beginnings_of(parent, part)
            self._index(key, parent, part)
            self._table.add(key, tail.own[index], store=True, segment=True)
        tail.own = [extent for index, extent in enumerate(tail.own) if index not in kept]
        tail.close()
        # What the chain shares with an older one is as fresh as what follows it now.
        for key in reversed(keys):
            block = self._table.find(key)
            if block is not None and block.idle:
                self._table.rest_again(block)
        return [key for key in keys if key in self._segments]

    def stands_on(self, root: bytes, blocks: Iterable[bytes]) -> None:
        """Notes which blocks a root stands for, so that its chains can be dropped with any of them."""
        if root in self._children:
            self._over[root] = frozenset(blocks)

    def drop_over(self, blocks: Collection[bytes]) -> None:
        """Drops every chain that was read over one of these blocks."""
        for root in [root for root, over in self._over.items() if not over.isdisjoint(blocks)]:
            for key in list(self._children[root]):
                self._table.drop(key)

    def _drop_beginnings_of(self, parent: bytes, part: tuple[int, ...]) -> None:
        """What a longer segment begins with is of no more use by itself."""
        for key in self._newest(parent):
            tokens, block = self._segments[key].tokens, self._table.find(key)
            if block is not None and block.idle and part[: len(tokens)] == tokens:
                self._table.remove(block)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every segment is resident and known to its parent."""
        for key, segment in self._segments.items():
            if key not in self._table or key not in self._children[segment.parent]:
                raise AssertionError(f"sealed segment {key.hex()} is not where its chain says")
        if sum(map(len, self._children.values())) != len(self._segments):
            raise AssertionError("chains name segments that are gone")
        if not self._over.keys() <= self._children.keys():
            raise AssertionError("roots without a chain are remembered")

    def _index(self, key: bytes, parent: bytes, part: tuple[int, ...]) -> None:
        self._segments[key] = _Segment(parent, part)
        self._children.setdefault(parent, {})[key] = None

    def _newest(self, parent: bytes) -> list[bytes]:
        return list(islice(reversed(self._children.get(parent, {})), _MOST_COMPARED))

    def _removed(self, block: Block) -> None:
        """A segment has gone; what follows it can be found no more, and goes too where nobody uses it."""
        if not self._unlink(block.key):
            return
        followers: list[Block] = []
        parents = [block.key]
        while parents:
            for key in list(self._children.get(parents.pop(), ())):
                follower = self._table.find(key)
                if follower is not None and follower.idle:
                    self._unlink(key)
                    followers.append(follower)
                    parents.append(key)
        for follower in followers:
            self._table.remove(follower)

    def _unlink(self, key: bytes) -> bool:
        segment = self._segments.pop(key, None)
        if segment is None:
            return False
        siblings = self._children[segment.parent]
        del siblings[key]
        if not siblings:
            del self._children[segment.parent]
            self._over.pop(segment.parent, None)
        return True


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
