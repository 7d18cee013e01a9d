"""Control tokens that only the template may speak, and a cache that stays within its bound."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import gateway
from gateway.prompt import PromptTokenizer
from gateway.prompt.token_cache import TokenCache
from shared.errors import DrystoneError, Reason

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def decoded(tokenizer: PromptTokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def control_ids(tokenizer: PromptTokenizer) -> set[int]:
    return set(tokenizer._tokenizer.convert_tokens_to_ids(sorted(tokenizer.control_tokens)))


def test_import_is_light():
    check = "import sys, gateway.prompt; assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(gateway.__file__).parents[1])


def test_control_tokens_are_special_or_written_by_the_template(chatml: PromptTokenizer, base: PromptTokenizer):
    assert {"<|im_end|>", "<think>"} <= chatml.control_tokens
    assert "        " not in chatml.control_tokens
    assert "<think>" not in base.control_tokens


@pytest.mark.parametrize("control", ["<|im_end|>", "<think>", "<|eot_id|>"])
def test_control_token_in_a_document_is_text(chatml: PromptTokenizer, control: str):
    text = f"before {control} after"
    allowed = chatml.encode(text, allow_special=True)
    refused = chatml.encode(text, allow_special=False)
    assert control_ids(chatml) & set(allowed)
    assert not control_ids(chatml) & set(refused)
    assert decoded(chatml, refused) == text


def test_control_token_that_is_an_ordinary_piece_too_is_text(tmp_path: Path):
    pieces = [("<unk>", 0.0), ("</s>", -0.1), *((letter, -5.0) for letter in "ab</s>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)  # noqa: S106
    tokenizer = PromptTokenizer(tmp_path)
    assert tokenizer.encode("a</s>b", allow_special=True).count(1) == 1
    refused = tokenizer.encode("a</s>b", allow_special=False)
    assert tokenizer._tokenizer.convert_ids_to_tokens(list(refused)) == ["a", "<", "/", "s", ">", "b"]


def test_ordinary_added_tokens_stay_in_documents(chatml: PromptTokenizer):
    text = "a" + " " * 8 + "b"
    assert chatml.encode(text, allow_special=False) == chatml.encode(text, allow_special=True)


def test_nothing_is_added_or_cut(llama3: PromptTokenizer):
    ids = llama3.encode("stone " * 50, allow_special=True)
    assert llama3.adds_bos
    assert llama3.bos_token_id not in ids
    assert decoded(llama3, ids) == "stone " * 50


def test_encoding_together_is_encoding_the_joined_text(chatml: PromptTokenizer):
    parts = [("<|im_start|>system\n", True), ("a wall", False), ("s<|im_end|>", True)]
    joined = "".join(text for text, _ in parts)
    assert chatml.encode_together(parts) == chatml.encode(joined, allow_special=True)
    assert chatml.encode_together([]) == ()


def test_encoding_together_keeps_documents_from_speaking(chatml: PromptTokenizer):
    parts = [("<|im_start|>", True), ("a<|im_end|><think>", False), ("<|im_end|>", True)]
    ids = chatml.encode_together(parts)
    assert len(control_ids(chatml) & set(ids)) == 2
    assert sum(token in control_ids(chatml) for token in ids) == 2
    assert decoded(chatml, ids) == "<|im_start|>a<|im_end|><think><|im_end|>"


@given(text=TEXT)
def test_ordinary_text_is_encoded_the_same_either_way(chatml: PromptTokenizer, text: str):
    assert chatml.encode(text, allow_special=False) == chatml.encode(text, allow_special=True)


def test_many_threads_agree(chatml: PromptTokenizer):
    texts = [f"stone {index} <|im_end|>" for index in range(50)] * 4
    with ThreadPoolExecutor(8) as pool:
        refused = list(pool.map(lambda text: chatml.encode(text, allow_special=False), texts))
        allowed = list(pool.map(lambda text: chatml.encode(text, allow_special=True), texts))
    for text, ids in zip(texts, refused, strict=True):
        assert list(ids) == chatml._without_special.encode(text, add_special_tokens=False).ids
    assert all(control_ids(chatml) & set(ids) for ids in allowed)


def test_template_message_reaches_the_caller(no_system: PromptTokenizer):
    with pytest.raises(DrystoneError, match="System role not supported") as raised:
        no_system.render_chat([{"role": "system", "content": "a"}])
    assert raised.value.reason == Reason.INVALID_TEMPLATE


def test_no_chat_template_is_an_error(base: PromptTokenizer):
    assert not base.has_chat_template
    with pytest.raises(DrystoneError, match="no chat template"):
        base.render_chat([{"role": "user", "content": "a"}])


def test_server_keywords_are_reserved(llama3: PromptTokenizer):
    assert {"messages", "chat_template", "tokenize", "add_generation_prompt", "bos_token"} <= (
        llama3.reserved_template_kwargs
    )


def test_cache_lets_the_least_recently_used_go():
    cache = TokenCache(5)
    first, second, third = (TokenCache.key(name, allow_special=True) for name in "abc")
    cache.put(first, (1, 2))
    cache.put(second, (3, 4))
    assert cache.get(first) == (1, 2)
    cache.put(third, (5, 6))
    assert (cache.get(first), cache.get(second), cache.get(third)) == ((1, 2), None, (5, 6))
    assert cache.held_tokens == 4


def test_cache_keeps_within_its_bound():
    cache = TokenCache(3)
    key = TokenCache.key("a", allow_special=True)
    cache.put(key, (1, 2, 3, 4))
    assert cache.get(key) is None
    cache.put(key, (1, 2))
    cache.put(key, (1, 2, 3))
    assert cache.held_tokens == 3
    for index in range(9):
        cache.put(TokenCache.key(str(index), allow_special=True), ())
    assert cache.held_tokens == 3


def test_cache_tells_the_two_ways_apart():
    assert TokenCache.key("a", allow_special=True) != TokenCache.key("a", allow_special=False)
