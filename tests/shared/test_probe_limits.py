"""The edges of the proof: every served kind in bfloat16, and contexts that are hardly longer than the probe."""

from __future__ import annotations

import pytest

from shared.engine import served_model
from shared.engine.rotation import RotationKind
from shared.model import ModelError
from tests.conftest import MakeFolder
from tests.support.tiny_models import KINDS_REFUSED, KINDS_SERVED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS_SERVED)
def test_bfloat16_is_proved_as_float32_is(tiny_folder: MakeFolder, kind: str) -> None:
    exact, rounded = (
        served_model.load(tiny_folder(kind), name=kind, dtype=dtype).geometry for dtype in ("float32", "bfloat16")
    )
    assert rounded.rope_regime() == exact.rope_regime()
    assert rounded.windowed_layers == exact.windowed_layers
    assert {layer.rotation.kind for layer in rounded.layers} == {RotationKind.HALF}


@pytest.mark.parametrize("kind", [kind for kind in KINDS_REFUSED if kind != "llama-dynamic-ntk"])
def test_bfloat16_is_refused_as_float32_is(tiny_folder: MakeFolder, kind: str) -> None:
    with pytest.raises(ModelError, match="layer 0: "):
        served_model.load(tiny_folder(kind), name=kind, dtype="bfloat16")


@pytest.mark.parametrize("context", [1, 15, 16])
def test_a_context_too_short_to_be_proved_is_refused(tiny_folder: MakeFolder, context: int) -> None:
    with pytest.raises(ModelError, match=f"a context of {context} tokens is too short to be proved; 17 is the least"):
        served_model.load(tiny_folder(), name="t", dtype="float32", context_tokens=context)


@pytest.mark.parametrize("context", [17, 18, 19, 60])
def test_short_contexts_are_proved_alike(tiny_folder: MakeFolder, context: int) -> None:
    long = served_model.load(tiny_folder(), name="t", dtype="float32")
    short = served_model.load(tiny_folder(), name="t", dtype="float32", context_tokens=context)
    assert short.geometry.rope_regime() == long.geometry.rope_regime()
