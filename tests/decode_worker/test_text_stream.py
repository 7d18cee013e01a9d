"""Tokens to text with a real byte-level tokenizer: whole characters, stop strings, nothing lost."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from decode_worker.text import TextStream
from tests.support.tiny_models import VOCAB_SIZE, tiny_tokenizer

TOKENIZER: Any = tiny_tokenizer().backend_tokenizer
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
EMOJI = "👩‍🚀"


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def run(ids: list[int], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> tuple[list[str], str]:
    """Deltas as the engine sends them, and the stop string that ended the answer."""
    stream = TextStream(TOKENIZER, list(prompt), stop)
    deltas = []
    for token in ids:
        deltas.append(stream.push(token))
        if stream.matched_stop:
            break
    deltas.append(stream.finish())
    assert stream.finish() == ""
    return deltas, stream.matched_stop


def cut(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the stop string that ends first; of those that end there, the longest."""
    ends = [(text.index(one) + len(one), -len(one)) for one in stop if one in text]
    if not ends:
        return text
    end, length = min(ends)
    return text[: end + length]


@pytest.mark.parametrize("text", ["naïve ½ €", "日本語の壁", f"a{EMOJI}b🧱c", "𒀀𒁀", "a\u0301 e\u0308"])
def test_characters_split_over_tokens_come_whole(text: str) -> None:
    ids = ids_of(text)
    assert len(ids) > len(text), "every character here is several tokens"
    deltas, _ = run(ids)
    assert "".join(deltas) == text
    assert not any(REPLACEMENT in delta for delta in deltas)
    assert len([delta for delta in deltas if delta]) >= len(text)


def test_an_answer_that_ends_inside_a_character_leaves_it_out() -> None:
    ids = ids_of("wall 🧱")
    for missing in (1, 2, 3):
        deltas, _ = run(ids[:-missing])
        assert "".join(deltas) == "wall "


def test_special_tokens_are_not_text() -> None:
    end = TOKENIZER.token_to_id("<|im_end|>")
    deltas, _ = run([*ids_of("stone"), end, *ids_of(" wall")])
    assert "".join(deltas) == "stone wall"


def test_a_stop_string_inside_one_token() -> None:
    token = next(i for i in range(VOCAB_SIZE) if TOKENIZER.decode([i]) == " the")
    deltas, matched = run([*ids_of("wall"), token, *ids_of("x")], (" th",))
    assert ("".join(deltas), matched) == ("wall", " th")


def test_a_stop_string_across_tokens_is_held_back_and_never_sent() -> None:
    deltas, matched = run([*ids_of("ab"), *ids_of("Q"), *ids_of("Z"), *ids_of("X"), *ids_of("more")], ("QZX",))
    assert ("".join(deltas), matched) == ("ab", "QZX")
    assert deltas[:3] == ["a", "b", ""]


def test_what_was_held_back_is_released_at_the_end_and_when_it_goes_on_otherwise() -> None:
    deltas, matched = run([*ids_of("a"), *ids_of("Q"), *ids_of("Z")], ("QZX",))
    assert (deltas, matched) == (["a", "", "", "QZ"], "")
    deltas, matched = run([*ids_of("Q"), *ids_of("Q"), *ids_of("Z"), *ids_of("y")], ("QZX",))
    assert (deltas, matched) == (["", "Q", "", "QZy", ""], "")


def test_the_stop_that_ends_first_wins_and_of_equals_the_longest() -> None:
    deltas, matched = run(ids_of("one two three"), ("three", "two"))
    assert ("".join(deltas), matched) == ("one ", "two")
    deltas, matched = run([i for letter in "xabc" for i in ids_of(letter)], ("bc", "abc", "c"))
    assert ("".join(deltas), matched) == ("x", "abc")


def test_a_stop_of_several_bytes_in_one_character() -> None:
    deltas, matched = run(ids_of(f"up {EMOJI} down"), ("🚀",))
    assert matched == "🚀"
    assert "".join(deltas) == "up 👩\u200d"


TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=25)
STOPS = st.lists(st.text("abcQ tße🧱\n", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=300)
@given(text=st.text(st.sampled_from("ab cQtße🧱日\n") | st.characters(codec="utf-8"), max_size=30), stop=STOPS)
@example(text="QQZ", stop=("QZ",))
@example(text="aab", stop=("ab", "aab"))
def test_deltas_join_to_the_text_cut_at_the_stop(text: str, stop: tuple[str, ...]) -> None:
    ids = ids_of(text)
    whole = str(TOKENIZER.decode(ids))
    deltas, matched = run(ids, stop)
    assert "".join(deltas) == cut(whole, stop)
    assert bool(matched) is any(one in whole for one in stop)


@settings(max_examples=500)
@given(ids=TOKENS, prompt=TOKENS)
def test_any_tokens_whatever_never_fail(ids: list[int], prompt: list[int]) -> None:
    """A model may say anything: bytes that are no character among it. Deltas are what the whole decodes to."""
    deltas, _ = run(ids, (), tuple(prompt))
    sent = "".join(deltas)
    sent.encode()
    whole = str(TOKENIZER.decode(ids))
    if REPLACEMENT not in whole:
        assert sent == whole


@pytest.mark.parametrize("prompt", ["🧱", "wall 🧱", "é"])
def test_a_prompt_cut_inside_a_character_does_not_leak_into_the_answer(prompt: str) -> None:
    # The question block of a FULL prompt is its last token alone: here the last byte of a character.
    deltas, _ = run(ids_of("stone wall"), (), tuple(ids_of(prompt)[-1:]))
    assert "".join(deltas) == "stone wall"
