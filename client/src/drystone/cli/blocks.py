"""`drystone blocks`: what the cluster holds, and what is to stay."""

import json
import sys
from itertools import islice
from typing import Annotated

import typer

from drystone import DEFAULT_ADDRESS, Client
from drystone.cli.block_selection import (
    KeysArgument,
    ModelOption,
    PrefixOption,
    TagOption,
    TenantOption,
    blocks_of,
    count,
    digits,
    only,
    selector,
    some,
)
from drystone.cli.blocks_view import block_as_dict, print_block, print_list
from drystone.cli.console import ExitCode, JsonOption, ServerOption, fail, say, telling_errors
from drystone.cli.summary import human_bytes


def build_app() -> typer.Typer:
    """The command with its commands."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    app.callback()(_blocks)
    app.command("ls")(list_blocks)
    app.command("show")(show)
    app.command("pin")(pin)
    app.command("unpin")(unpin)
    app.command("rm")(remove)
    return app


def _blocks() -> None:
    """Stored blocks: where each lives, and what is to stay.

    \b
    Examples:
      drystone blocks ls --tag handbook
      drystone blocks show 3f9a
      drystone blocks rm --tag handbook

    \b
    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart


def list_blocks(
    prefix: Annotated[str, typer.Argument(help="Beginning of the keys.", show_default=False)] = "",
    *,
    tag: TagOption = None,
    tenant: TenantOption = "",
    model: ModelOption = "",
    limit: Annotated[int, typer.Option(min=0, help="Most blocks to show. 0: all.")] = 100,
    server: ServerOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Lists blocks: tokens, bytes, where they are, hits, last use.

    \b
    Examples:
      drystone blocks ls
      drystone blocks ls 3f --tag handbook --limit 0 --json

    \b
    Exit codes: 0 shown, 1 failed, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    with telling_errors(server), Client(server) as client:
        found = client.blocks.list(key_prefix=digits(prefix), tags=tag or (), tenant=tenant, model=model)
        blocks = list(islice(found, limit or None))
        more = bool(limit) and next(found, None) is not None
    if as_json:
        print(json.dumps({"blocks": list(map(block_as_dict, blocks)), "more": more}, ensure_ascii=False))
        return
    print_list(blocks)
    if more:
        say(f"there are more than {limit}: --limit 0 shows all")


def show(
    key: Annotated[str, typer.Argument(help="A key, or a beginning that only one key has.", show_default=False)],
    *,
    tenant: TenantOption = "",
    model: ModelOption = "",
    server: ServerOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Shows one block in full.

    \b
    Examples:
      drystone blocks show 3f9a
      drystone blocks show 3f9a --json

    \b
    Exit codes: 0 shown, 1 no such block or failed, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    with telling_errors(server), Client(server) as client:
        block = only(client, key, tenant, model)
    if as_json:
        print(json.dumps(block_as_dict(block), ensure_ascii=False))
    else:
        print_block(block)


def pin(
    keys: KeysArgument = None,
    *,
    prefix: PrefixOption = "",
    tag: TagOption = None,
    tenant: TenantOption = "",
    model: ModelOption = "",
    server: ServerOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Keeps blocks from eviction.

    \b
    Examples:
      drystone blocks pin 3f9a 77c0
      drystone blocks pin --tag handbook

    \b
    Exit codes: 0 done, 1 no such block or failed, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    with telling_errors(server), Client(server) as client:
        changed = client.blocks.pin(**some(selector(client, keys, prefix, tag, tenant, model)))
    _say_changed("pinned", changed, as_json=as_json)


def unpin(
    keys: KeysArgument = None,
    *,
    prefix: PrefixOption = "",
    tag: TagOption = None,
    tenant: TenantOption = "",
    model: ModelOption = "",
    server: ServerOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Lets pinned blocks go again.

    \b
    Examples:
      drystone blocks unpin 3f9a
      drystone blocks unpin --tag handbook

    \b
    Exit codes: 0 done, 1 no such block or failed, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    with telling_errors(server), Client(server) as client:
        changed = client.blocks.unpin(**some(selector(client, keys, prefix, tag, tenant, model)))
    _say_changed("unpinned", changed, as_json=as_json)


def remove(
    keys: KeysArgument = None,
    *,
    prefix: PrefixOption = "",
    tag: TagOption = None,
    tenant: TenantOption = "",
    model: ModelOption = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: ServerOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Deletes blocks from every tier and every worker; their keys end.

    Asks first, on a terminal; elsewhere it needs --yes. The server refuses to delete everything.

    \b
    Examples:
      drystone blocks rm 3f9a
      drystone blocks rm --tag handbook --yes

    \b
    Exit codes: 0 deleted, 1 refused, failed or not wanted, 2 wrong usage, 4 no server.
    """  # noqa: D301 - \b keeps the lines of an example apart
    if not yes and not _on_a_terminal():
        fail("nobody can be asked here: give --yes", ExitCode.USAGE)
    with telling_errors(server), Client(server) as client:
        chosen = selector(client, keys, prefix, tag, tenant, model)
        if not yes and not typer.confirm(f"Delete {count(client, chosen)}?", err=True):
            fail("nothing was deleted")
        deleted = client.blocks.delete(**chosen)
    if as_json:
        print(json.dumps({"blocks": deleted.blocks, "bytes_freed": deleted.bytes_freed}))
    else:
        print(f"deleted {blocks_of(deleted.blocks)}, {human_bytes(deleted.bytes_freed)} freed")


def _say_changed(verb: str, changed: int, *, as_json: bool) -> None:
    print(json.dumps({"blocks_changed": changed}) if as_json else f"{verb} {blocks_of(changed)}")


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()
