"""One small stack for each module that does not break it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import structlog
import torch

from tests.conftest import MakeFolder
from tests.support.stacks import Served, serving


@pytest.fixture(scope="session", autouse=True)
def quiet_logs() -> Iterator[None]:
    """Errors alone, as plain text: what a failing test shows must be readable."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_folder: MakeFolder) -> AsyncIterator[Served]:
    """A gateway, a prefill worker and a decode worker of a tiny model."""
    async with serving(tiny_folder()) as stack:
        yield stack
