"""Arithmetic of the comparison: what a client saw, made into figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.streams import Arrival, Spread, TokenStream, decode_rate, whole_rate


def stream(sent: float, *arrivals: tuple[float, int]) -> TokenStream:
    return TokenStream(sent, tuple(Arrival(at, tokens) for at, tokens in arrivals), prompt_tokens=10)


def steady(sent: float, first: float, gap: float, tokens: int) -> TokenStream:
    return stream(sent, *((first + gap * place, place + 1) for place in range(tokens)))


def test_first_token_counts_from_the_request() -> None:
    assert steady(sent=2.0, first=2.5, gap=0.1, tokens=4).ttft == pytest.approx(0.5)


def test_an_event_with_several_tokens_shares_its_gap() -> None:
    assert stream(0.0, (1.0, 1), (1.2, 2), (1.8, 5)).gaps == pytest.approx([0.2, 0.2, 0.2, 0.2])


def test_the_first_events_tokens_have_no_gap() -> None:
    assert stream(0.0, (1.0, 3)).gaps == []


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 5)), min_size=1, max_size=20))
def test_gaps_fill_the_time_between_first_and_last_token(events: list[tuple[float, int]]) -> None:
    at, tokens, arrivals = 1.0, 0, []
    for wait, brought in events:
        at, tokens = at + wait, tokens + brought
        arrivals.append((at, tokens))
    one = stream(0.0, *arrivals)
    assert len(one.gaps) == one.tokens - arrivals[0][1]
    assert sum(one.gaps) == pytest.approx(arrivals[-1][0] - arrivals[0][0])


def test_whole_rate_spans_the_first_request_and_the_last_token() -> None:
    streams = [steady(0.0, 1.0, 0.5, 3), steady(0.5, 3.0, 0.5, 5)]
    assert whole_rate(streams) == pytest.approx(8 / 5.0)


def test_decode_rate_leaves_out_prefill_and_the_stragglers_end() -> None:
    # Both decode from 3.0, the second's first token, to 5.0, the first's last: 4 tokens of one, 2 of the other.
    streams = [steady(0.0, 1.0, 0.5, 9), steady(0.0, 3.0, 1.0, 9)]
    assert decode_rate(streams) == pytest.approx((4 + 2) / 2.0)


def test_decode_rate_needs_a_time_in_which_all_decode() -> None:
    assert decode_rate([steady(0.0, 1.0, 0.1, 5), steady(0.0, 9.0, 0.1, 5)]) is None


@pytest.mark.parametrize(("moment", "tokens"), [(0.5, 0), (1.0, 1), (1.4, 1), (1.5, 2), (99.0, 3)])
def test_tokens_at_a_moment(moment: float, tokens: int) -> None:
    assert steady(0.0, 1.0, 0.5, 3).tokens_at(moment) == tokens


def test_spread_of_several_and_of_one() -> None:
    assert Spread((4.0, 1.0, 2.0, 3.0, 5.0)).median == 3.0
    assert Spread((4.0, 1.0, 2.0, 3.0, 5.0)).quartiles == (2.0, 4.0)
    assert Spread((7.0,)).quartiles == (7.0, 7.0)
