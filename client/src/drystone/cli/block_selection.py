"""Which blocks a command is about: keys or their beginnings, a prefix, tags, a tenant."""

import re
from itertools import islice
from typing import Annotated

import typer

from drystone import BlockInfo, BlockSelector, Client
from drystone.cli.blocks_view import SHOWN_DIGITS
from drystone.cli.console import ExitCode, fail

_KEY_DIGITS = 64
_HEXADECIMAL = re.compile(rf"[0-9a-f]{{1,{_KEY_DIGITS}}}", re.ASCII)
# A question about more blocks than this does not count them first.
_COUNTED = 1000

KeysArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEYS", help="Keys, or beginnings that only one key has.")
]
PrefixOption = Annotated[str, typer.Option(metavar="DIGITS", help="Every block whose key begins like this.")]
TagOption = Annotated[list[str] | None, typer.Option(help="Blocks with this tag; repeat for any of more.")]
TenantOption = Annotated[str, typer.Option(help="Whose blocks, when you may say so.")]
ModelOption = Annotated[str, typer.Option(help="Model name, when the gateway has several.")]


def selector(
    client: Client, keys: list[str] | None, prefix: str, tag: list[str] | None, tenant: str, model: str
) -> BlockSelector:
    """The selector for what was given, with every key whole."""
    whole = [_whole_key(client, key, tenant, model) for key in keys or ()]
    return {"keys": whole, "key_prefix": digits(prefix), "tags": tag or (), "tenant": tenant, "model": model}


def some(chosen: BlockSelector) -> BlockSelector:
    """The selector, unless it would take every block: that is more likely a slip."""
    if not (chosen["keys"] or chosen["key_prefix"] or chosen["tags"] or chosen["tenant"]):
        fail("say which blocks: KEYS, --prefix, --tag or --tenant", ExitCode.USAGE)
    return chosen


def only(client: Client, key: str, tenant: str, model: str) -> BlockInfo:
    """The one block whose key is or begins with `key`."""
    beginning = digits(key)
    if not beginning:
        # As from an empty shell variable; it would be the beginning of every key.
        fail("an empty KEY names no block", ExitCode.USAGE)
    blocks = list(islice(client.blocks.list(key_prefix=beginning, page_size=2, tenant=tenant, model=model), 2))
    if not blocks:
        fail(f"no block whose key is or begins with {key}")
    if len(blocks) > 1:
        few = " and ".join(f"{block.key[: len(beginning) + SHOWN_DIGITS]}…" for block in blocks)
        fail(f"{key} is the beginning of several keys, such as {few}: give more digits", ExitCode.USAGE)
    return blocks[0]


def digits(text: str) -> str:
    """The hexadecimal digits of a key or of its beginning, as `ls` shows it; may be empty."""
    lower = text.strip().lower().removesuffix("…")
    if lower and not _HEXADECIMAL.fullmatch(lower):
        fail(f"{text} is neither a key nor its beginning: at most {_KEY_DIGITS} hexadecimal digits", ExitCode.USAGE)
    return lower


def count(client: Client, chosen: BlockSelector) -> str:
    """How many blocks a selector takes, for people."""
    found = sum(1 for _ in islice(client.blocks.list(page_size=_COUNTED, **chosen), _COUNTED + 1))
    return blocks_of(found) if found <= _COUNTED else f"more than {_COUNTED} blocks"


def blocks_of(number: int) -> str:
    """A number of blocks, for people."""
    return f"{number} block" if number == 1 else f"{number} blocks"


def _whole_key(client: Client, key: str, tenant: str, model: str) -> str:
    key_digits = digits(key)
    return key_digits if len(key_digits) == _KEY_DIGITS else only(client, key, tenant, model).key
