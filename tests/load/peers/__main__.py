"""Installs peers and lists them: `python -m tests.load.peers install vllm`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.load.peers.folders import peers_dir
from tests.load.peers.registry import PEERS, peer


def main() -> int:
    """Exit code 1: a step of an installation failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="peers, and whether they are installed")
    install = commands.add_parser("install", help="install peers that are not installed yet")
    install.add_argument("names", nargs="+", choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    options = parser.parse_args()
    for name in options.names if options.command == "install" else PEERS:
        chosen = peer(name)
        reason = chosen.missing()
        if options.command == "list" or not reason:
            print(f"{name:16} {chosen.version:36} {reason or 'installed'}")
            continue
        print(f"{name}: into {peers_dir()}", file=sys.stderr)
        try:
            chosen.install(lambda line, name=name: print(f"{name}: {line} ...", file=sys.stderr, flush=True))  # type: ignore[misc] # a default argument binds the loop's name
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: not installed: {error}", file=sys.stderr)
            return 1
        print(f"{name}: installed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
