"""Log probabilities: of the raw logits, with the token's own bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from decode_worker.sampling import Choice, Sampler
from decode_worker.sampling.token_bytes import TokenBytes
from tests.sampling.conftest import WIDTH, state


def test_they_are_of_the_models_own_distribution(sampler: Sampler) -> None:
    logits = torch.randn((2, WIDTH), generator=torch.Generator().manual_seed(4)) * 3
    exact = logits.double().log_softmax(-1)
    asked = state(temperature=5.0, top_k=2, logit_bias={9: 100.0}, repetition_penalty=2.0, prompt=[1, 2], logprobs=4)
    chosen, silent = sampler.choose(logits.clone(), [asked, state()])
    assert isinstance(chosen, Choice)
    assert isinstance(silent, Choice)
    assert silent.logprob is None
    told = chosen.logprob
    assert told is not None
    assert told.token_id == chosen.token_id == 9
    assert told.logprob == pytest.approx(float(exact[0, 9]), abs=1e-5)
    best = exact[0].topk(4)
    assert [each.token_id for each in told.top] == best.indices.tolist()
    np.testing.assert_allclose([each.logprob for each in told.top], best.values.numpy(), atol=1e-5)
    assert sampler.logprobs_of(logits, [asked, state()], [9, 3]) == [told, None]


def test_none_asked_for_is_not_the_same_as_no_alternatives(sampler: Sampler) -> None:
    logits = torch.randn((1, WIDTH))
    (chosen,) = sampler.choose(logits, [state(logprobs=0)])
    assert isinstance(chosen, Choice)
    assert chosen.logprob is not None
    assert not chosen.logprob.top
    assert sampler.logprobs_of(logits, [state()], [1]) == [None]


def test_of_equal_alternatives_the_lower_ids_come_first(sampler: Sampler) -> None:
    logits = torch.zeros((1, WIDTH))
    logits[0, 300] = 1.0
    (told,) = sampler.logprobs_of(logits, [state(logprobs=4)], [300])
    assert told is not None
    assert [each.token_id for each in told.top] == [300, 0, 1, 2]


def test_the_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer) -> None:
    text = "The harbour: naïve 😀 0\n\t ü"
    table = TokenBytes(tokenizer)
    assert b"".join(table[token] for token in tokenizer.encode(text).ids) == text.encode()
    assert table[0] == b"<|endoftext|>"
    assert table[tokenizer.get_vocab_size() + 3] == b""


def test_byte_fallback_and_other_tokenizers() -> None:
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "\N{LOWER ONE EIGHTH BLOCK}caf": 3, "x": 4}
    fallback = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fallback.add_special_tokens([AddedToken("</s>", special=True)])
    table = TokenBytes(fallback)
    assert [table[token] for token in range(1, 6)] == [b"\xc3", b"\xa9", b" caf", b"x", b"</s>"]
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "word": 1, "##s": 2}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    assert TokenBytes(words)[1] == b"word"
