"""A loaded tiny model for the tests that encode."""

from __future__ import annotations

import pytest

from shared.engine import served_model
from shared.engine.served_model import ServedModel
from tests.conftest import MakeFolder


@pytest.fixture(scope="session")
def served(tiny_folder: MakeFolder) -> ServedModel:
    return served_model.load(tiny_folder(), name="tiny", dtype="float32")
