"""What lies in a store: blocks of this model, files that cannot be blocks, files of others."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefill_worker.tiers.block_file import FileIdentity, tokens_of
from prefill_worker.tiers.object_files import ObjectFiles, ObjectItem
from prefill_worker.tiers.object_names import BLOCKS, QUARANTINE, SUFFIX, ObjectNames


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """A file of the right name and of a size that `tokens` tokens have. Its bytes have not been looked at."""

    key: bytes
    tokens: int
    item: ObjectItem


@dataclass(slots=True)
class Survey:
    """One listing, sorted.

    Attributes:
        blocks: Of this model, the one written or used longest ago first.
        misfits: Named as blocks of this model, of a size that none has: cut off.
        strays: Blocks of other models, or of other versions of the layout.
        bad: What was put aside before.
    """

    blocks: list[FoundBlock] = field(default_factory=list)
    misfits: list[tuple[bytes, ObjectItem]] = field(default_factory=list)
    strays: list[ObjectItem] = field(default_factory=list)
    bad: list[ObjectItem] = field(default_factory=list)


async def survey(files: ObjectFiles, names: ObjectNames, identity: FileIdentity, *, everything: bool) -> Survey:
    """Lists a store.

    Args:
        files: The store.
        names: Of this model's blocks.
        identity: Of this model's blocks.
        everything: Other models' files too; else only what is under this model's prefix.

    Raises:
        ObjectError: The listing broke off.
    """
    found = Survey()
    # Few lengths make up a large store, and finding one out takes longer than all else here.
    tokens_by_size: dict[int, int | None] = {}
    async for items in files.list(BLOCKS if everything else names.blocks):
        for item in items:
            if item.size not in tokens_by_size:
                tokens_by_size[item.size] = tokens_of(item.size, identity)
            _sort(item, names, tokens_by_size[item.size], found)
    async for items in files.list(QUARANTINE if everything else f"{QUARANTINE}/{names.prefix}"):
        found.bad += items
    found.blocks.sort(key=lambda one: one.item.modified)
    return found


def _sort(item: ObjectItem, names: ObjectNames, tokens: int | None, found: Survey) -> None:
    key = names.key(item.name)
    if key is None:
        # What is not even named as ours was put here by somebody: it is let be.
        if item.name.endswith(SUFFIX):
            found.strays.append(item)
        return
    if tokens is None:
        found.misfits.append((key, item))
    else:
        found.blocks.append(FoundBlock(key, tokens, item))
