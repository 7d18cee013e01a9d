"""Encoding to the last digits: chunks of seven, one shot, and transformers' own cache agree in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from shared.engine import served_model
from shared.engine.encode import encode_block, new_extent
from tests.conftest import MakeFolder
from tests.support.tiny_models import KINDS_SERVED, SLIDING_WINDOW, VOCAB_SIZE

pytestmark = pytest.mark.usefixtures("one_thread")


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS_SERVED)
@pytest.mark.parametrize("tokens", [SLIDING_WINDOW - 1, SLIDING_WINDOW, SLIDING_WINDOW + 1, 3 * SLIDING_WINDOW + 5])
def test_sevens_one_shot_and_the_models_own_cache(tiny_folder: MakeFolder, kind: str, tokens: int) -> None:
    model = served_model.load(tiny_folder(kind), name=kind, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder(kind), attn_implementation="eager", dtype=torch.float32)
    ids = torch.randint(3, VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    # Without a config the cache keeps every key, those outside a window as well.
    cache = DynamicCache()
    plain(ids, past_key_values=cache, use_cache=True)
    expected = torch.stack(
        [torch.stack((kept.keys[0].transpose(0, 1), kept.values[0].transpose(0, 1)), dim=1) for kept in cache.layers]
    )
    for chunk_tokens in (7, tokens):
        extent = new_extent(model.geometry.shape, tokens).fill_(float("nan"))
        encode_block(model, ids[0].tolist(), extent, chunk_tokens)
        assert distance(extent, expected) < 1e-5, chunk_tokens
