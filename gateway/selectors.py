"""Which blocks an operator means: rules on selectors, in the words of the internal services."""

from __future__ import annotations

import re

from drystone.v1.generation_pb2 import BlockSelector
from gateway.prompt.content import is_block_key
from gateway.tenants import Tenants, check_tenant
from gateway.warm_rules import check_tags
from shared.errors import InvalidRequestError, Reason
from shared.internal.v1.prefill_pb2 import DescribeStoredRequest
from shared.kv.keys import KEY_BYTES

MAX_KEYS = 10_000
MAX_PAGE = 1000
DEFAULT_PAGE = 100
_PREFIX = re.compile(r"[0-9a-f]*")


def stored_request(selector: BlockSelector, tenants: Tenants) -> DescribeStoredRequest:
    """The selector for prefill workers; raises InvalidRequestError when it breaks a rule."""
    if len(selector.block_keys) > MAX_KEYS:
        raise InvalidRequestError(
            Reason.INVALID_FIELD,
            "selector.block_keys",
            "has too many entries",
            limit=MAX_KEYS,
            value=len(selector.block_keys),
        )
    for index, key in enumerate(selector.block_keys):
        check_key(key, f"selector.block_keys[{index}]")
    prefix = selector.key_prefix.lower()
    if len(prefix) > 2 * KEY_BYTES or not _PREFIX.fullmatch(prefix):
        raise InvalidRequestError(
            Reason.INVALID_BLOCK_KEY,
            "selector.key_prefix",
            "must be hexadecimal digits, at most as many as a key has",
            limit=2 * KEY_BYTES,
            value=repr(prefix[:80]),
        )
    check_tags(selector.tags, "selector.tags")
    check_tenant(selector.tenant, "selector.tenant")
    return DescribeStoredRequest(
        keys=[bytes.fromhex(key) for key in dict.fromkeys(selector.block_keys)],
        key_prefix=prefix,
        tags=selector.tags,
        tenant=tenants.named(selector.tenant).name,
    )


def refuse_everything(selector: BlockSelector, tenants: Tenants, call: str) -> None:
    """Raises when a selector selects everything there is; a tenant's name selects nothing where tenants share."""
    tenant = tenants.named(selector.tenant).name
    if not (selector.block_keys or selector.key_prefix or selector.tags or tenant):
        raise InvalidRequestError(
            Reason.INVALID_FIELD,
            "selector",
            f"selects everything; {call} needs keys, a prefix, tags or a tenant",
        )


def page(size: int, token: str) -> tuple[int, bytes]:
    """Blocks of a page, and the key that it comes after."""
    if token:
        check_key(token, "page_token")
    return min(size, MAX_PAGE) if size else DEFAULT_PAGE, bytes.fromhex(token)


def check_key(key: str, field: str) -> None:
    """Raises for what is no block key."""
    if not is_block_key(key):
        raise InvalidRequestError(
            Reason.INVALID_BLOCK_KEY, field, "must be 64 hexadecimal digits", limit=64, value=repr(key[:80])
        )
