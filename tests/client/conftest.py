"""A canned gateway for the tests of the client."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from tests.client.canned_gateway import CannedGateway

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def gateway() -> Iterator[CannedGateway]:
    server = CannedGateway()
    yield server
    server.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound and not listened on: nobody can take it, and connections are refused."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
