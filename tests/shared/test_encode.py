"""Encoding a block: in chunks as in one, and the same KV as the model's own forward makes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from shared.engine import served_model
from shared.engine.encode import encode_block, new_extent
from shared.engine.served_model import ServedModel
from tests.conftest import MakeFolder
from tests.support.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["llama-default", "llama-yarn", "llama-mha-untied", "qwen2", "qwen3", "qwen3-mixed-window", "mistral-sliding"]
TOKENS = 150


def ids(tokens: int = TOKENS) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (tokens,), generator=torch.Generator().manual_seed(6)).tolist()


def encoded(model: ServedModel, token_ids: list[int], chunk_tokens: int) -> torch.Tensor:
    extent = new_extent(model.geometry.shape, len(token_ids)).fill_(float("nan"))
    encode_block(model, token_ids, extent, chunk_tokens)
    assert not extent.isnan().any(), "not every element was written"
    return extent


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.inference_mode()
def test_equal_to_the_models_own_cache(tiny_folder: MakeFolder, kind: str) -> None:
    model = served_model.load(tiny_folder(kind), name=kind, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder(kind), attn_implementation="eager", dtype=torch.float32)
    cache = DynamicCache()
    plain(torch.tensor([ids()]), past_key_values=cache, use_cache=True)
    extent = encoded(model, ids(), TOKENS)
    for layer in range(model.geometry.shape.layers):
        for index, kept in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
            torch.testing.assert_close(extent[layer, :, index], kept[0].transpose(0, 1), atol=2e-4, rtol=2e-4)


def test_chunks_change_nothing(tiny_folder: MakeFolder, kind: str) -> None:
    model = served_model.load(tiny_folder(kind), name=kind, dtype="float32")
    whole = encoded(model, ids(), TOKENS)
    for chunk_tokens in (11, 64, 149):
        torch.testing.assert_close(encoded(model, ids(), chunk_tokens), whole, atol=2e-4, rtol=2e-4)


def test_a_block_knows_nothing_of_what_follows(tiny_folder: MakeFolder) -> None:
    model = served_model.load(tiny_folder(), name="tiny", dtype="float32")
    whole = encoded(model, ids(), 64)
    torch.testing.assert_close(encoded(model, ids()[:40], 64), whole[:, :40], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded(model, ids()[:20], 1), whole[:, :20], atol=1e-5, rtol=1e-4)
    assert encoded(model, [5], 512).shape == (3, 1, 2, 2, 16)


def test_bfloat16_stays_near(tiny_folder: MakeFolder) -> None:
    exact = served_model.load(tiny_folder(), name="tiny", dtype="float32")
    rounded = served_model.load(tiny_folder(), name="tiny", dtype="bfloat16")
    extent = encoded(rounded, ids(), 64)
    assert extent.dtype == torch.bfloat16
    expected = encoded(exact, ids(), 64)
    assert float((extent.float() - expected).norm() / expected.norm()) < 0.03
