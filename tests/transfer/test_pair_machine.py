"""Both ends of a pair against every order of messages, losses, repetitions and spoilt bits that hypothesis finds.

`DRYSTONE_FUZZ_SECONDS`, whatever its value, has it look at thirty times as many.
"""

from __future__ import annotations

import itertools
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefill_worker.transfer.link import State
from prefill_worker.transfer.outgoing import Shipped
from shared.errors import DrystoneError
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.hand_wire import HandWire
from tests.support.wire import flipped

_NUMBERS = st.integers(1, 3)


class PairMachine(RuleBasedStateMachine):
    """A link, a receiver, and a wire in the hands of an adversary without keys."""

    def __init__(self) -> None:
        super().__init__()
        self.wire = HandWire()
        self.transfers = itertools.count(1)

    @initialize(greeted=st.booleans())
    def three_blocks_are_on_their_way(self, greeted: bool) -> None:  # noqa: FBT001 - hypothesis gives it by name
        for number in (1, 2, 3):
            self.wire.expect(number)
            self.wire.ship(number, next(self.transfers))
        if greeted:
            self.wire.receive(self.wire.there.popleft())
            self.wire.hear(self.wire.back.popleft())

    @rule(number=_NUMBERS)
    def somebody_waits(self, number: int) -> None:
        if number not in self.wire.requests:
            self.wire.expect(number)

    @rule(number=_NUMBERS)
    def it_is_shipped(self, number: int) -> None:
        if self.wire.link.state is not State.BROKEN:
            self.wire.ship(number, next(self.transfers))

    @precondition(lambda self: self.wire.begun)
    @rule(data=st.data())
    def nobody_wants_it_any_more(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(sorted(self.wire.begun)))
        self.wire.link.cancel(self.wire.begun.pop(transfer), "cancelled")
        self.wire.outcomes.setdefault(transfer, DrystoneError.__new__(DrystoneError))

    @rule(number=_NUMBERS)
    def the_request_leaves(self, number: int) -> None:
        if number in self.wire.requests:
            self.wire.end(number)

    @rule(number=_NUMBERS)
    def the_fetch_is_driven_anew(self, number: int) -> None:
        request = self.wire.requests.get(number)
        for fetch in request.fetches if request is not None else ():
            fetch.restart()

    @precondition(lambda self: self.wire.there)
    @rule(count=st.integers(1, 20))
    def arrive_there(self, count: int) -> None:
        for _ in range(min(count, len(self.wire.there))):
            self.wire.receive(self.wire.there.popleft())

    @precondition(lambda self: self.wire.back)
    @rule(count=st.integers(1, 12))
    def arrive_back(self, count: int) -> None:
        for _ in range(min(count, len(self.wire.back))):
            self.wire.hear(self.wire.back.popleft())

    @precondition(lambda self: self.wire.there)
    @rule()
    def lost_there(self) -> None:
        self.wire.there.popleft()

    @precondition(lambda self: self.wire.back)
    @rule()
    def lost_back(self) -> None:
        self.wire.back.popleft()

    @precondition(lambda self: self.wire.there)
    @rule()
    def twice_there(self) -> None:
        self.wire.there.append(self.wire.there[0])

    @precondition(lambda self: self.wire.back)
    @rule()
    def twice_back(self) -> None:
        self.wire.back.append(self.wire.back[0])

    @precondition(lambda self: self.wire.there)
    @rule(turns=st.integers(1, 5))
    def out_of_order(self, turns: int) -> None:
        self.wire.there.rotate(turns)

    @precondition(lambda self: self.wire.there)
    @rule(bit=st.integers(0, 1 << 24))
    def header_spoilt(self, bit: int) -> None:
        frames = self.wire.there.popleft()
        self.wire.there.appendleft([flipped(frames[0], bit), *frames[1:]])

    @precondition(lambda self: any(len(frames) > 1 for frames in self.wire.there))
    @rule(bit=st.integers(0, 1 << 24), draw=st.data())
    def data_spoilt(self, bit: int, draw: st.DataObject) -> None:
        with_data = [index for index, frames in enumerate(self.wire.there) if len(frames) > 1]
        index = draw.draw(st.sampled_from(with_data))
        frames = self.wire.there[index]
        self.wire.there[index] = [frames[0], flipped(frames[1], bit)]

    @precondition(lambda self: self.wire.there)
    @rule(length=st.integers(0, 1 << 21))
    def cut_short(self, length: int) -> None:
        frames = list(self.wire.there.popleft())
        self.wire.there.appendleft([*frames[:-1], frames[-1][:length]])

    @rule()
    def the_receiver_forgets_the_connection(self) -> None:
        for name in [pair.peer for pair in self.wire.receiver.pairs.all()]:
            self.wire.receiver.pairs.forget(name)

    @rule(seconds=st.floats(0.05, 1.5))
    def time_passes(self, seconds: float) -> None:
        self.wire.now += seconds
        self.wire.link.tick(self.wire.now)

    @invariant()
    def nothing_wrong_is_visible(self) -> None:
        self.wire.check()

    def teardown(self) -> None:
        wire = self.wire
        wire.settle()
        for transfer in wire.begun:
            outcome = wire.outcomes[transfer]  # each has ended, once and with a reason
            assert isinstance(outcome, Shipped | DrystoneError)
        wire.check()
        wire.close()
        assert_all_free_after_eviction(wire.pool)


TestPair = PairMachine.TestCase
TestPair.settings = settings(
    max_examples=3000 if "DRYSTONE_FUZZ_SECONDS" in os.environ else 100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
