"""Drystone's version, and that of the protocol between its processes."""

VERSION = "0.1.0"
PROTOCOL_VERSION = 2
