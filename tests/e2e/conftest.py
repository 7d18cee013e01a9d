"""One small stack for each module that does not break it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.conftest import MakeFolder
from tests.support.stacks import Served, serving


@pytest.fixture(scope="package", autouse=True)
def alone(one_thread: None) -> None:
    """Every test here runs tiny models."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_folder: MakeFolder) -> AsyncIterator[Served]:
    """A gateway, a prefill worker and a decode worker of a tiny model."""
    async with serving(tiny_folder()) as stack:
        yield stack
