"""What must be equal before KV may pass: every field is compared, and the one that differs is named."""

from __future__ import annotations

import pytest

from shared.engine import served_model
from shared.internal.v1.common_pb2 import Compatibility
from shared.kv.layout import LAYOUT_VERSION
from shared.transfer.compatibility import compatibility_of, difference
from shared.version import PROTOCOL_VERSION
from tests.conftest import MakeFolder
from tests.support.fake_workers import compatibility

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = {
    "protocol_version": 99,
    "model_fingerprint": b"n" * 32,
    "dtype": "bfloat16",
    "layout_version": 2,
    "rope_regime": b"s" * 32,
    "layers": 4,
    "kv_heads": 1,
    "head_dim": 32,
}


def test_every_field_has_its_test() -> None:
    assert set(OTHER) == {field.name for field in Compatibility.DESCRIPTOR.fields}


def test_equal_ones_do_not_differ() -> None:
    assert difference(compatibility(), compatibility()) is None


@pytest.mark.parametrize("field", OTHER)
def test_the_field_that_differs_is_named(field: str) -> None:
    found = difference(compatibility(), compatibility(**{field: OTHER[field]}))
    assert found is not None
    name, sentence = found
    assert name == field
    assert sentence.startswith(f"{field} differs: receiver has ")
    assert len(sentence) < 120


def test_the_first_of_many_is_named() -> None:
    found = difference(compatibility(), compatibility(**OTHER))
    assert found is not None
    assert found[0] == "protocol_version"


def test_a_loaded_model_says_what_its_kv_is(tiny_folder: MakeFolder) -> None:
    full, rounded = (served_model.load(tiny_folder(), name="t", dtype=dtype) for dtype in ("float32", "bfloat16"))
    window = served_model.load(tiny_folder("mistral-sliding"), name="t", dtype="float32")
    other = served_model.load(tiny_folder(seed=1), name="t", dtype="float32")
    said = compatibility_of(full)
    assert (said.protocol_version, said.layout_version) == (PROTOCOL_VERSION, LAYOUT_VERSION)
    assert (said.layers, said.kv_heads, said.head_dim, said.dtype) == (3, 2, 16, "float32")
    assert len(said.model_fingerprint) == len(said.rope_regime) == 32
    assert compatibility_of(full) == said
    for model, fields in (
        (rounded, {"dtype"}),
        (window, {"model_fingerprint", "rope_regime"}),
        (other, {"model_fingerprint"}),
    ):
        differing = {name for name in OTHER if getattr(said, name) != getattr(compatibility_of(model), name)}
        assert differing == fields
