"""Block keys: golden, sensitive to every field, and never ambiguous."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shared.kv.keys import KEY_BYTES, KeySpace

SPACE = KeySpace(b"f" * 32, "float32", 1, b"r" * 32)
TOKENS = [1, 2, 3, 70000]


def test_the_golden_key() -> None:
    # A release that computes another one must raise the layout version: caches on disk would be lost unseen.
    assert SPACE.key(TOKENS).hex() == "eddca89fa7eb10bb150d20574be7d9306d1797df02591a907c5d8a947d4f0381"
    assert len(SPACE.key([])) == KEY_BYTES


@pytest.mark.parametrize(
    "changed",
    [
        {"model_fingerprint": b"g" * 32},
        {"dtype": "bfloat16"},
        {"layout_version": 2},
        {"rope_regime": b"s" * 32},
        {"tenant_salt": b"acme"},
    ],
    ids=str,
)
def test_every_field_counts(changed: dict[str, object]) -> None:
    other = replace(SPACE, **changed)  # type: ignore[arg-type] # fields of the right kind by name
    assert other.key(TOKENS) != SPACE.key(TOKENS)
    assert other.key(TOKENS) == replace(SPACE, **changed).key(TOKENS)  # type: ignore[arg-type] # likewise


def test_tokens_count_and_so_does_their_order() -> None:
    keys = {SPACE.key(tokens) for tokens in ([1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3, 0], [0, 1, 2, 3], [])}
    assert len(keys) == 6
    assert SPACE.key((1, 2, 3)) == SPACE.key([1, 2, 3])


def test_bytes_cannot_move_from_one_field_to_the_next() -> None:
    """Every field is prefixed with its length."""
    one = KeySpace(b"ab", "c", 1, b"de", b"fg")
    others = [
        KeySpace(b"a", "bc", 1, b"de", b"fg"),
        KeySpace(b"abc", "", 1, b"de", b"fg"),
        KeySpace(b"ab", "c", 1, b"d", b"efg"),
        KeySpace(b"ab", "c", 1, b"defg", b""),
        KeySpace(b"ab", "c", 1, b"", b"defg"),
    ]
    assert len({space.key([1]) for space in (one, *others)}) == 6
    salted = KeySpace(b"", "", 1, b"", (1).to_bytes(4, "little"))
    assert salted.key([2]) != KeySpace(b"", "", 1, b"", b"").key([1, 2])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.lists(st.integers(0, 2**32 - 1), max_size=20), st.binary())
def test_equal_exactly_when_the_tokens_are(one: list[int], other: list[int], salt: bytes) -> None:
    space = replace(SPACE, tenant_salt=salt)
    assert (space.key(one) == space.key(other)) is (one == other)


def test_a_token_that_is_none_is_refused() -> None:
    for token in (-1, 2**32):
        with pytest.raises(OverflowError):
            SPACE.key([token])
