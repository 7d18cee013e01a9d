"""What every test shares: how hypothesis runs, and tiny models that are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run: a red build is a change, never luck. `--hypothesis-profile=explore` draws anew.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")

MakeFolder = Callable[..., Path]


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
