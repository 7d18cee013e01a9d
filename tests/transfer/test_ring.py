"""Room for runs, against a map of every byte."""

from hypothesis import given
from hypothesis import strategies as st

from shared.transfer.ring import Ring


@given(st.integers(1, 40), st.lists(st.one_of(st.none(), st.integers(0, 45)), max_size=100))
def test_no_two_runs_share_a_byte(capacity: int, steps: list[int | None]) -> None:
    ring = Ring(capacity)
    there: list[tuple[int, int]] = []
    for length in steps:
        if length is None:
            if there:
                assert ring.oldest == there.pop(0)
                ring.drop()
            continue
        offset = ring.take(length)
        if offset is None:
            assert there or not 0 < length <= capacity
            continue
        assert 0 <= offset <= capacity - length
        assert all(offset + length <= start or start + size <= offset for start, size in there)
        there.append((offset, length))
        assert len(ring) == len(there)


def test_room_comes_back_at_the_front() -> None:
    ring = Ring(10)
    assert [ring.take(4), ring.take(4), ring.take(4)] == [0, 4, None]
    ring.drop()
    assert [ring.take(4), ring.take(1)] == [0, None]
    ring.drop()
    assert [ring.take(4), ring.take(4)] == [4, None]
