"""What is known of a warmed block without its KV."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.kv.keys import KeySpace


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """Enough to encode a block again, and to say whose it is. It outlives the block's KV.

    Attributes:
        key: 32 bytes (shared/kv/keys.py).
        token_ids: Its tokens.
        tenant: Whose it is; empty for the tenant without a name.
        tenant_salt: What the key was made with; empty where tenants share.
        tags: Names to find it by; sorted and distinct once it is kept.
        expires_at: Unix seconds at which it ends. None: it does not.
        pinned: Its KV is kept from eviction.
    """

    key: bytes
    token_ids: tuple[int, ...]
    tenant: str
    tenant_salt: bytes
    tags: tuple[str, ...]
    expires_at: float | None
    pinned: bool

    def ended(self, now: float) -> bool:
        """True when its time is up at `now`, in Unix seconds."""
        return self.expires_at is not None and self.expires_at <= now

    def united(self, other: BlockRecord) -> BlockRecord:
        """This record with what another one of the same key adds: tags, the later end, a pin.

        Where tenants share, the first one to warm a block stays the one whose it is.
        """
        ends = None if self.expires_at is None or other.expires_at is None else max(self.expires_at, other.expires_at)
        return replace(
            self, tags=_sorted({*self.tags, *other.tags}), expires_at=ends, pinned=self.pinned or other.pinned
        )

    def settled(self) -> BlockRecord:
        """The same record as it is kept: its tags sorted, each once."""
        return replace(self, tags=_sorted(set(self.tags)))

    def belongs(self, space: KeySpace) -> bool:
        """True when the key is of these tokens, under this record's salt, in a key space."""
        return replace(space, tenant_salt=self.tenant_salt).key(self.token_ids) == self.key


def space_name(space: KeySpace) -> str:
    """Sixteen hexadecimal digits that stand for a key space, whatever the tenant.

    They cover all that keys depend on beside tokens and salt, so that the records of another model, dtype or layout
    lie elsewhere and are never taken for damaged ones.
    """
    return replace(space, tenant_salt=b"").key(()).hex()[:16]


def _sorted(tags: set[str]) -> tuple[str, ...]:
    return tuple(sorted(tags))
