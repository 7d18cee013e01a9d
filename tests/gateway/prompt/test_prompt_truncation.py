"""Prompts that are too long: refused, or cut without touching the question."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_requests import (
    BLOCK,
    FULL,
    LEFT,
    RIGHT,
    SIDES,
    WORDS,
    all_ids,
    limited,
    rag,
)
from prompt_templates import MakePlanner

from drystone.v1 import prompt_pb2 as prompts
from drystone.v1 import sampling_pb2
from gateway.prompt import PromptLimits, PromptTokenizer
from shared.errors import DrystoneError, InvalidRequestError, Reason


def test_too_long_is_refused_with_limit_value_and_advice(chatml: PromptTokenizer, make_planner: MakePlanner):
    for attention in (BLOCK, FULL):
        with pytest.raises(InvalidRequestError, match=r"truncation\.side to LEFT or RIGHT") as raised:
            make_planner(chatml).plan(rag("Stone.", attention=attention, truncation=limited(9)), {})
        assert (raised.value.reason, raised.value.field) == (Reason.PROMPT_TOO_LONG, "rag")
        assert raised.value.metadata["limit"] == "9"


def test_the_narrowest_limit_counts(chatml: PromptTokenizer, make_planner: MakePlanner):
    sampling = sampling_pb2.SamplingParams(max_new_tokens=20)
    request = rag("Stone.", sampling=sampling, truncation=limited(28))
    for context, server, limit, because in (
        (40, None, "20", "context of 40 less max_new_tokens 20"),
        (100, 25, "25", "this server's limit"),
        (100, None, "28", "truncation.max_prompt_tokens"),
    ):
        planner = make_planner(chatml, context_tokens=context, limits=PromptLimits(max_prompt_tokens=server))
        with pytest.raises(InvalidRequestError, match=because) as raised:
            planner.plan(request, {})
        assert raised.value.metadata["limit"] == limit


def test_answer_that_fills_the_context_is_refused(chatml: PromptTokenizer, make_planner: MakePlanner):
    with pytest.raises(InvalidRequestError) as raised:
        make_planner(chatml, context_tokens=128).plan(rag("Stone."), {})
    assert raised.value.field == "sampling.max_new_tokens"
    assert (raised.value.metadata["limit"], raised.value.metadata["value"]) == ("127", "128")


@pytest.mark.parametrize(("side", "dropped"), [(LEFT, (0,)), (RIGHT, (2,))])
def test_whole_passages_give_way(
    chatml: PromptTokenizer, make_planner: MakePlanner, side: prompts.TruncationSide, dropped: tuple[int, ...]
):
    planner = make_planner(chatml)
    whole = planner.plan(rag("Stone.", "Wall.", "Sheep."), {})
    room = whole.prompt_tokens - 1
    plan = planner.plan(rag("Stone.", "Wall.", "Sheep.", truncation=limited(room, side)), {})
    assert plan.dropped_documents == dropped
    assert plan.truncated_tokens == len(whole.blocks[1 + dropped[0]].token_ids)
    assert [block.document_index for block in plan.blocks[1:]] == [index for index in range(3) if index not in dropped]


@given(texts=st.lists(WORDS, min_size=1, max_size=5), room=st.integers(1, 300), side=SIDES, full=st.booleans())
def test_truncation_keeps_the_limit_and_the_question(
    chatml: PromptTokenizer,
    make_planner: MakePlanner,
    texts: list[str],
    room: int,
    side: prompts.TruncationSide,
    full: bool,  # noqa: FBT001
):
    planner, attention = make_planner(chatml), FULL if full else BLOCK
    whole = planner.plan(rag(*texts, attention=attention), {})
    try:
        plan = planner.plan(rag(*texts, attention=attention, truncation=limited(room, side)), {})
    except DrystoneError as error:
        assert error.reason == Reason.PROMPT_TOO_LONG  # noqa: PT017
        assert len(whole.blocks[0].token_ids) + len(whole.question_ids) > room
        assert not full
        return
    assert plan.prompt_tokens <= room
    assert plan.prompt_tokens + plan.truncated_tokens == whole.prompt_tokens
    if full:
        ids = all_ids(whole)
        assert all_ids(plan) == (ids[-plan.prompt_tokens :] if side == LEFT else ids[: plan.prompt_tokens])
        return
    assert plan.question_ids == whole.question_ids
    assert plan.blocks[0] == whole.blocks[0]
    kept = [block.document_index for block in plan.blocks[1:]]
    assert sorted([*kept, *plan.dropped_documents]) == list(range(len(texts)))
    assert kept == (list(range(len(texts)))[-len(kept) :] if side == LEFT else list(range(len(kept)))) or not kept
