"""What every test shares: how hypothesis runs, and tiny models that are made once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

# The same examples on every run: a red build is a change, never luck. `--hypothesis-profile=explore` draws anew.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")

MakeFolder = Callable[..., Path]


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
def interruptible() -> None:
    """A shell's background job ignores SIGINT, and so would every process that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="package")
def one_thread() -> Iterator[None]:
    """One torch thread: for tiny tensors more of them only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Gives the folder of a tiny model; one is made for each kind and seed."""
    from tests.support.tiny_models import make_tiny

    made: dict[tuple[str, int, float], Path] = {}

    def folder(kind: str = "llama-default", seed: int = 0, eos_scale: float = 0.3) -> Path:
        name = (kind, seed, eos_scale)
        if name not in made:
            made[name] = make_tiny(kind, tmp_path_factory.mktemp(kind), seed, eos_scale)
        return made[name]

    return folder
