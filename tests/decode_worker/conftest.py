"""A loaded tiny model, shared by the tests that run one."""

from __future__ import annotations

import pytest

from shared.engine import served_model
from shared.engine.served_model import ServedModel
from tests.conftest import MakeFolder


@pytest.fixture(scope="session")
def model(tiny_folder: MakeFolder) -> ServedModel:
    return served_model.load(tiny_folder(), name="tiny", dtype="float32")


@pytest.fixture(scope="package", autouse=True)
def alone(one_thread: None) -> None:
    """Every test here works on tiny tensors."""
