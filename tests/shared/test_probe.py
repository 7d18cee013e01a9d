"""The proof at load: every kind that is served, and every refusal with its layer and its reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.engine import seam, served_model
from shared.engine.probe import ProbeError, probe
from shared.engine.rotation import RotationKind
from shared.model.catalog import ModelError
from tests.conftest import MakeFolder
from tests.support.tiny_models import KINDS_REFUSED, KINDS_SERVED, MAX_POSITIONS, SLIDING_WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = {"qwen3-mixed-window": [None, SLIDING_WINDOW] * 2, "mistral-sliding": [SLIDING_WINDOW] * 3}
REFUSALS = {
    "gpt2": r"layer 0: values change by .*learned positions",
    "hunyuan_v1_dense": r"layer 0: no known rotation .* norm or scale after RoPE",
}
# Refused where the served context crosses a change of regime; its own context of 64 tokens does not.
REFUSED_BEYOND = {"llama-dynamic-ntk": 64}


def test_every_kind_has_its_test() -> None:
    assert {*REFUSALS, *REFUSED_BEYOND} == set(KINDS_REFUSED)


@pytest.mark.parametrize("kind", KINDS_SERVED)
def test_served(tiny_folder: MakeFolder, kind: str) -> None:
    model = served_model.load(tiny_folder(kind), name=kind, dtype="float32")
    config = model.module.config
    shape = model.geometry.shape
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.dtype) == (
        config.num_hidden_layers,
        config.num_key_value_heads,
        head_dim,
        "float32",
    )
    assert model.geometry.heads == config.num_attention_heads
    assert [layer.window for layer in model.geometry.layers] == WINDOWS.get(kind, [None] * shape.layers)
    assert {layer.rotation.kind for layer in model.geometry.layers} == {RotationKind.HALF}
    assert len({id(layer.rotation) for layer in model.geometry.layers}) == 1
    assert model.context_tokens == MAX_POSITIONS
    assert config.eos_token_id in model.eos_token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama-default", "qwen3", "qwen3-mixed-window"])
def test_low_precision_is_proved_as_well(tiny_folder: MakeFolder, kind: str, dtype: str) -> None:
    model = served_model.load(tiny_folder(kind), name=kind, dtype=dtype)
    assert model.geometry.shape.dtype == dtype
    assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused_by_layer_and_reason(tiny_folder: MakeFolder, kind: str) -> None:
    with pytest.raises(ModelError, match=REFUSALS[kind]) as caught:
        served_model.load(tiny_folder(kind), name="Tiny", dtype="float32")
    assert str(caught.value).startswith("Tiny cannot be served with block attention: ")


@pytest.mark.parametrize("kind", REFUSED_BEYOND)
def test_refused_beyond_its_regime(tiny_folder: MakeFolder, kind: str) -> None:
    limit = REFUSED_BEYOND[kind]
    model = served_model.load(tiny_folder(kind), name=kind, dtype="float32")
    assert model.context_tokens == limit
    with pytest.raises(ValueError, match=f"{limit + 1} is more than the model's {limit}"):
        served_model.load(tiny_folder(kind), name=kind, dtype="float32", context_tokens=limit + 1)
    for context in (limit + 1, 200):
        with pytest.raises(ProbeError, match=r"layer 0: no known rotation moves its queries and keys by \d+ positions"):
            probe(model.module, dtype="float32", context_tokens=context)


def test_every_regime_has_its_own_digest(tiny_folder: MakeFolder) -> None:
    kinds = ("llama-default", "llama-linear", "llama-yarn", "llama-llama3rope", "mistral", "mistral-sliding")
    regimes = {
        kind: served_model.load(tiny_folder(kind), name=kind, dtype="float32").geometry.rope_regime() for kind in kinds
    }
    assert regimes["llama-default"] == regimes["mistral"]
    assert len(set(regimes.values())) == len(kinds) - 1
    assert {len(regime) for regime in regimes.values()} == {32}


def test_what_the_seam_cannot_give_is_refused(tiny_folder: MakeFolder) -> None:
    seam.register()
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder(), attn_implementation=seam.NAME, dtype=torch.float32, use_safetensors=True
    )
    forward = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "softcap": 5.0})
    with pytest.raises(ProbeError, match="layer 1: softcap is not supported"):
        probe(model, dtype="float32", context_tokens=1024)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ProbeError, match="2 of 3 layers reached the attention seam"):
        probe(model, dtype="float32", context_tokens=1024)


def test_layer_types_that_are_not_known_are_named(tiny_folder: MakeFolder) -> None:
    config = AutoConfig.from_pretrained(tiny_folder("qwen3-mixed-window"))
    model = AutoModelForCausalLM.from_config(config)
    model.config.layer_types[2] = "chunked_attention"
    with pytest.raises(ProbeError, match=r"layer types \['chunked_attention'\] are not supported"):
        probe(model, dtype="float32", context_tokens=1024)


def test_settings_that_no_model_has(tiny_folder: MakeFolder) -> None:
    with pytest.raises(ValueError, match="context_tokens: 9000 is more than the model's 8192"):
        served_model.load(tiny_folder(), name="tiny", dtype="float32", context_tokens=9000)
    with pytest.raises(ValueError, match="dtype: 'int8' is none of"):
        served_model.load(tiny_folder(), name="tiny", dtype="int8")
    assert served_model.load(tiny_folder(), name="t", dtype="float32", context_tokens=100).context_tokens == 100
    assert served_model.choose_dtype("auto", "cpu") in ("float32", "bfloat16")
