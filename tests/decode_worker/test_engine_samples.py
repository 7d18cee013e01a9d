"""Several samples, interrupted answers and conversations: each says what a fresh request alone would say."""

from __future__ import annotations

from typing import Any

import pytest

from decode_worker.tail import SEGMENT_TOKENS, Tail, segments_for
from drystone.v1.sampling_pb2 import FinishReason
from shared.engine.served_model import ServedModel
from shared.errors import Reason
from tests.decode_worker.test_engine import block, driven, reservations
from tests.support.decode_parts import assert_idle, make_request
from tests.support.stacks import until

DRAWN = {"temperature": 1.0, "seed": 11, "max_new_tokens": 9}
LONG = range(4, 4 + SEGMENT_TOKENS + 20)


@pytest.mark.parametrize("question", [range(4, 12), range(4, 4 + SEGMENT_TOKENS), LONG])
async def test_samples_say_what_each_says_alone(model: ServedModel, question: range) -> None:
    async with driven(model) as run:
        request, sink = run.submit(question=question, n=4, **DRAWN)
        await run.ended(request)
        together = [sink.token_ids(index) for index in range(4)]
        assert len({tuple(said) for said in together}) > 1
        assert sink.kinds().count("sample_ended") == 4
        assert sink.kinds()[-1] == "ended"
        first, alone = run.submit(question=question, **DRAWN)
        await run.ended(first)
        assert alone.token_ids() == together[0]
        again, sink = run.submit(question=question, n=4, **DRAWN)
        await run.ended(again)
        assert [sink.token_ids(index) for index in range(4)] == together
        assert_idle(run.pool)


async def test_samples_share_everything_but_their_answers(model: ServedModel) -> None:
    async with driven(model) as run:
        request, _ = run.submit([block(1)], question=LONG, n=5, **{**DRAWN, "max_new_tokens": 60})
        [one] = run.pool.fetches.all()
        run.engine.encode_here(request, [run.pool.fetches.reservation(one)])
        await until(lambda: len(request.samples[4].generated) > 1)
        lead = segments_for(len(LONG) + 60)
        tails = (lead + 4 * (lead - 1)) * SEGMENT_TOKENS
        assert run.pool.arena.used_bytes == run.pool.arena.shape.extent_bytes(10 + tails)
        await run.ended(request)


async def test_a_sample_that_ends_early_gives_its_tail_back(model: ServedModel) -> None:
    async with driven(model) as run:
        free, sink = run.submit(n=2, **DRAWN)
        await run.ended(free)
        only_second = next(iter(set(sink.token_ids(1)) - set(sink.token_ids(0))))
        request, sink = run.submit(n=2, stop_ids=frozenset({only_second}), **{**DRAWN, "max_new_tokens": 40})
        await until(lambda: request.samples[1].finished and not request.samples[0].finished)
        assert request.samples[1].tail is None
        await run.ended(request)
        reasons = {
            m.sample_ended.sample_index: m.sample_ended.finish_reason for m in sink if m.HasField("sample_ended")
        }
        assert reasons[1] == FinishReason.FINISH_REASON_STOP


@pytest.mark.parametrize("cut", [1, 4, 8])
async def test_an_interrupted_answer_goes_on_as_if_never_interrupted(model: ServedModel, cut: int) -> None:
    penalties = {"repetition_penalty": 1.7, "frequency_penalty": 0.4, "min_new_tokens": 6}
    async with driven(model) as run:
        whole, sink = run.submit(question=LONG, n=2, **DRAWN, **penalties)
        await run.ended(whole)
        said = [sink.token_ids(index) for index in range(2)]
        past = {0: said[0][:cut], 1: said[1][: cut // 2]}
        rest, sink = run.submit(question=LONG, n=2, resumed=past, **DRAWN, **penalties)
        await run.ended(rest)
        assert [[*past[index], *sink.token_ids(index)] for index in range(2)] == said
        completed = [m.sample_ended.completion_tokens for m in sink if m.HasField("sample_ended")]
        assert completed == [9, 9]


async def test_a_follow_up_runs_only_its_new_tokens_and_says_the_same(model: ServedModel) -> None:
    blocks = [block(1), block(2)]
    async with driven(model, tokens=4000) as run:
        first, sink = run.submit(blocks, question=LONG, keep_tail=True, max_new_tokens=60)
        run.engine.encode_here(first, reservations(sink))
        await run.ended(first)
        answer = sink.token_ids()
        keys = sink[-1].ended.tail_keys
        assert len(keys) == segments_for(len(LONG) + len(answer) - 1)
        follow_up = [*LONG, *answer, 9, 8, 7]
        fresh, heard = run.submit(blocks, question=follow_up, max_new_tokens=20)
        assert heard[0].admitted.tail_tokens_reused == len(LONG) + len(answer) - 1
        await run.ended(fresh)
        while run.pool.blocks.evict_one():
            pass
        alone, truth = run.submit(blocks, question=follow_up, max_new_tokens=20)
        assert truth[0].admitted.tail_tokens_reused == 0
        run.engine.encode_here(alone, reservations(truth))
        await run.ended(alone)
        assert heard.token_ids() == truth.token_ids()


async def test_another_question_over_the_same_blocks_begins_where_it_differs(model: ServedModel) -> None:
    async with driven(model, tokens=4000) as run:
        first, sink = run.submit([block(1)], question=[*range(4, 30), 50], keep_tail=True)
        run.engine.encode_here(first, reservations(sink))
        await run.ended(first)
        second, sink = run.submit([block(1)], question=[*range(4, 30), 60, 61])
        assert sink[0].admitted.tail_tokens_reused == 26
        await run.ended(second)
        # Other blocks, another order, or no blocks at all: another conversation.
        other, sink = run.submit(question=[*range(4, 30), 60, 61])
        assert sink[0].admitted.tail_tokens_reused == 0
        await run.ended(other)


async def test_the_same_question_again_runs_its_last_token(model: ServedModel) -> None:
    async with driven(model, tokens=4000) as run:
        question = range(4, 4 + 2 * SEGMENT_TOKENS)
        first, sink = run.submit(question=question, keep_tail=True)
        await run.ended(first)
        again, heard = run.submit(question=question, n=2, keep_tail=True)
        assert heard[0].admitted.tail_tokens_reused == len(question) - 1
        await run.ended(again)
        assert heard.token_ids(0) == heard.token_ids(1) == sink.token_ids()


async def test_sealed_tails_make_room_and_what_follows_goes_with_what_was_before(model: ServedModel) -> None:
    async with driven(model, tokens=6 * SEGMENT_TOKENS) as run:
        first, _ = run.submit(question=LONG, keep_tail=True, max_new_tokens=60)
        await run.ended(first)
        assert len(run.pool.sealed) == 3
        root = run.pool.sealed.match(first.tail_root, list(LONG)).full[0]
        run.pool.blocks.drop(root.key)
        assert len(run.pool.sealed) == 0
        assert run.pool.arena.used_bytes == 0
        kept, _ = run.submit(question=LONG, keep_tail=True, max_new_tokens=60)
        await run.ended(kept)
        large, _ = run.submit(question=range(4, 300), max_new_tokens=80)
        await run.ended(large)
        assert len(run.pool.sealed) < 3
        assert_idle(run.pool)


async def test_what_was_said_until_the_deadline_stands(model: ServedModel) -> None:
    async with driven(model, tokens=4000) as run:
        request, sink = run.submit(max_new_tokens=900, seconds=0.4, n=2)
        await run.ended(request)
        assert sink.kinds()[-3:] == ["sample_ended", "sample_ended", "ended"]
        assert {m.sample_ended.finish_reason for m in sink if m.HasField("sample_ended")} == {
            FinishReason.FINISH_REASON_DEADLINE
        }
        assert len(sink.token_ids(0)) > 0


async def test_places_are_for_those_whose_blocks_are_there(model: ServedModel) -> None:
    async with driven(model, tokens=4000) as run:
        run.engine._max_samples = 2
        fetching, _ = run.submit([block(1)], n=2)
        warm, sink = run.submit(n=2)
        await run.ended(warm)
        assert sink.kinds()[-1] == "ended"
        assert not fetching.finished
        run.engine.cancel(fetching)


async def test_no_more_samples_run_than_there_are_places_and_small_ones_pass_for_a_while(model: ServedModel) -> None:
    async with driven(model, tokens=4000) as run:
        run.engine._max_samples = 3
        most = 0
        step = run.runner.run

        def counted(entries: Any) -> Any:
            nonlocal most
            most = max(most, run.engine.lifecycle.samples)
            return step(entries)

        run.runner.run = counted  # type: ignore[method-assign] # stands in for the real one
        asked = [run.submit(n=n, max_new_tokens=20)[0] for n in (2, 3, 1, 2, 3, 1)]
        await run.ended(*asked)
        assert most == 3


async def test_a_chain_of_thousands_goes_at_once(model: ServedModel) -> None:
    """Evicting the root of a long conversation frees all of it, and does not recurse."""
    async with driven(model, tokens=SEGMENT_TOKENS * 2000) as run:
        table, sealed = run.pool.blocks, run.pool.sealed
        tail = Tail(run.pool.arena, 0)
        for _ in range(2000):
            extent = run.pool.arena.allocate(SEGMENT_TOKENS)
            assert extent is not None
            tail.own.append(extent)
        tail.filled = 2000 * SEGMENT_TOKENS
        tokens = [index % 97 for index in range(tail.filled)]
        keys = sealed.seal(b"root" * 8, tokens, tail)
        assert len(keys) == len(sealed) == 2000
        table.drop(keys[0])
        assert len(sealed) == len(table) == 0
        assert run.pool.arena.free_records == run.pool.arena.capacity_records


async def test_a_request_that_cannot_be_admitted_for_a_defect_fails_alone(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(model) as run:
        admit = run.pool.admit
        monkeypatch.setattr(run.pool, "admit", lambda *_, **__: 1 / 0)
        broken, sink = run.submit()
        assert sink[-1].failed.reason == Reason.INTERNAL
        assert broken.finished
        monkeypatch.setattr(run.pool, "admit", admit)
        sound, sink = run.submit()
        await run.ended(sound)
        assert sink.kinds()[-1] == "ended"


async def test_a_failed_try_changes_nothing(model: ServedModel) -> None:
    async with driven(model, tokens=40 + 4 * SEGMENT_TOKENS) as run:
        first, sink = run.submit([block(1)])
        run.engine.encode_here(first, reservations(sink))
        await run.ended(first)
        running, _ = run.submit(question=range(4, 12), max_new_tokens=180)
        version, [held] = run.pool.version, run.pool.blocks.all()
        hits = held.hits
        for may_move in (False, True):
            big = make_request([block(1), block(2, 60)], question=range(4, 12), max_new_tokens=60)
            assert run.pool.admit(big, may_move=may_move) is None
        assert (run.pool.version, held.hits, len(run.pool.blocks)) == (version, hits, 1)
        run.engine.cancel(running)
