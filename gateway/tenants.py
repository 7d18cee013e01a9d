"""Tenants: whose blocks a request may use, and the salt that keeps them apart.

A block's key is made with its tenant's salt, so that two tenants' blocks of the same text have different keys in
every tier and on every worker: neither can use, name, see or delete the other's, nor learn from a first token that
comes early that another tenant has sent the same text. Where an operator lets tenants share, all are one tenant.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from shared.errors import InvalidRequestError, Reason

MAX_BYTES = 128
_SALT_BYTES = 32


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant, as keys know it.

    Attributes:
        name: Empty for callers that name none, and for everybody where tenants share.
        salt: Goes into every key; empty for the tenant without a name.
    """

    name: str = ""
    salt: bytes = b""


class Tenants:
    """Makes tenants of names.

    Args:
        share_blocks: All tenants use the same blocks.
        secret: Goes into every salt, so that keys cannot be made by who knows a tenant's name and a text. Every
            gateway of a cluster needs the same one; another one makes all blocks of named tenants unknown.
    """

    def __init__(self, *, share_blocks: bool, secret: str) -> None:
        self._share_blocks = share_blocks
        self._key = hashlib.blake2b(secret.encode(), digest_size=64).digest() if secret else b""

    def named(self, name: str) -> Tenant:
        """The tenant of a valid name."""
        if not name or self._share_blocks:
            return Tenant()
        salt = hashlib.blake2b(name.encode(), key=self._key, digest_size=_SALT_BYTES, person=b"drystone-tenant")
        return Tenant(name, salt.digest())


def check_tenant(name: str, field: str = "tenant") -> None:
    """Raises InvalidRequestError for a name that is too long or not printable."""
    size = len(name.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise InvalidRequestError(Reason.INVALID_FIELD, field, "is too long, in bytes", limit=MAX_BYTES, value=size)
    if not name.isprintable():
        raise InvalidRequestError(Reason.INVALID_FIELD, field, "must be printable", value=repr(name))
