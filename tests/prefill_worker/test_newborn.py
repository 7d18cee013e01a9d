"""A block while it is made: what has a checksum is final and leaves; what is not made is never seen."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefill_worker import forward as forward_module
from prefill_worker.forward import Forward
from prefill_worker.newborn import Newborn
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.errors import SourceLostError
from shared.engine.encode import new_extent
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import KvEndpoint
from shared.kv import birth as birth_module
from shared.kv.birth import chunk_checksum, chunk_plan
from shared.kv.keys import KEY_BYTES
from shared.transfer.raw import raw_bytes
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.stacks import until
from tests.support.wire import CHUNKS, SHAPE, TOKENS, Wire, make_block, wired


class Making:
    """A newborn of random bytes, whose layers are written when a test says so."""

    def __init__(self, number: int = 1) -> None:
        self.final = make_block(number)
        self._bytes = bytearray(len(self.final.data))
        self._layer = len(self._bytes) // SHAPE.layers
        self.newborn = Newborn(self.final.key, self.final.token_ids, "", SHAPE, memoryview(self._bytes))

    def write(self, first: int, last: int) -> None:
        """Layers [first, last) are written, and told of."""
        part = slice(first * self._layer, last * self._layer)
        self._bytes[part] = self.final.data[part]
        self.newborn.layers_done(last)


def test_checksums_come_with_their_layers() -> None:
    making = Making()
    newborn = making.newborn
    assert newborn.stops == (1, 2, 3, 4)
    assert newborn.bytes == SHAPE.extent_bytes(TOKENS)
    assert [newborn.checksum(index) for index in range(CHUNKS)] == [None] * CHUNKS
    making.write(0, 2)
    assert [newborn.checksum(index) is None for index in range(CHUNKS)] == [False, False, True, True]
    with pytest.raises(ValueError, match="2 of 4 chunks"):
        newborn.whole()
    making.write(2, 4)
    block = newborn.whole()
    assert (block.key, block.birth_id, block.data) == (newborn.key, newborn.birth_id, newborn.data)
    sums = [
        chunk_checksum(newborn.key, newborn.birth_id, SHAPE, TOKENS, chunk, block.data[chunk.offset :][: chunk.length])
        for chunk in chunk_plan(SHAPE, TOKENS)
    ]
    assert list(block.birth.checksums) == sums


def test_whoever_looks_on_hears_of_each_change_until_it_ends() -> None:
    making = Making()
    heard: list[int] = []

    def broken() -> None:
        if making.newborn.checksum(0) is not None:
            raise RuntimeError("a wake with a defect")

    making.newborn.subscribe(broken)
    end = making.newborn.subscribe(lambda: heard.append(sum(making.newborn.checksum(i) is not None for i in range(4))))
    making.write(0, 1)
    making.write(1, 3)
    end()
    end()
    making.write(3, 4)
    assert heard == [0, 1, 2, 3], "at once, and after each chunk; another's defect ends nothing"


def test_failure_is_said_once_and_a_whole_block_cannot_fail() -> None:
    failing = Making().newborn
    failing.fail("no memory")
    failing.fail("later")
    assert failing.failure == "no memory"
    with pytest.raises(ValueError, match="no memory"):
        failing.layers_done(1)
    whole = Making()
    whole.write(0, 4)
    whole.newborn.fail("too late")
    assert whole.newborn.failure is None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of the tiny model is a chunk."""
    monkeypatch.setattr(birth_module, "chunk_plan", functools.partial(chunk_plan, chunk_bytes=1))


class Block:
    def __init__(self, tokens: int) -> None:
        self.key, self.tenant = bytes(KEY_BYTES), ""
        self.token_ids = tuple(5 + index % 50 for index in range(tokens))


def _layer_chunks(newborn: Newborn, layer: int) -> list[int]:
    return [chunk.index for chunk in newborn._birth.chunks if chunk.first_layer == layer]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [7, 600], ids=["one pass", "two passes"])
def test_a_forward_tells_of_layers_before_later_ones_are_computed(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    extents: list[torch.Tensor] = []
    seen: list[tuple[bytes, bool]] = []

    def empty(*arguments: Any) -> torch.Tensor:
        extents.append(new_extent(*arguments).fill_(torch.nan))
        return extents[-1]

    def watch(_: Block, newborn: Newborn | None) -> None:
        assert newborn is not None

        def wake() -> None:
            if newborn.checksum(_layer_chunks(newborn, 0)[-1]) is not None and not seen:
                [extent] = extents
                own = extent[-1, -min(tokens, 88) :]
                seen.append((raw_bytes(extent[0].contiguous()).tobytes(), bool(torch.isnan(own).all())))

        newborn.subscribe(wake)

    monkeypatch.setattr(forward_module, "new_extent", empty)
    [made] = Forward(served, None, watch).run([Block(tokens)]).made
    assert isinstance(made, StoredBlock)
    [(first_layer, later_missing)] = seen
    assert later_missing, "the last layer's rows of the last pass were not computed yet"
    assert made.data[: len(first_layer)].tobytes() == first_layer, "what had left did not change afterwards"


@pytest.mark.usefixtures("small_chunks")
def test_a_late_layer_that_is_not_finite_fails_what_left_early(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    newborns: list[Newborn | None] = []
    whole = ServedModel.forward_kv

    def spoiled(model: ServedModel, ids: torch.Tensor, positions: torch.Tensor, context: Any) -> None:
        whole(model, ids, positions, context)
        context.extent[-1, 3] = torch.inf

    monkeypatch.setattr(ServedModel, "forward_kv", spoiled)
    [made] = Forward(served, None, lambda _, newborn: newborns.append(newborn)).run([Block(9)]).made
    assert isinstance(made, DrystoneError)
    newborn, gone = newborns
    assert gone is None
    assert newborn is not None
    assert newborn.checksum(0) is not None, "its first layers could leave"
    assert newborn.failure is not None
    assert "not finite" in newborn.failure
    with pytest.raises(ValueError, match="chunks are summed"):
        newborn.whole()


async def test_chunks_cross_the_wire_while_later_layers_are_made() -> None:
    async with wired() as wire:
        making = Making()
        request = wire.expect(making.final)
        shipping = asyncio.create_task(wire.shipper.ship(making.newborn, wire.reservation(request), _endpoint(wire)))
        for layer in range(CHUNKS - 1):
            making.write(layer, layer + 1)
            await until(_received(wire, layer + 1))
            assert not shipping.done()
            assert wire.committed == []
        making.write(CHUNKS - 1, CHUNKS)
        shipped = await shipping
        assert shipped.bytes == making.newborn.bytes
        assert wire.committed == [making.final.key]
        assert wire.resident_bytes(making.final) == bytes(making.final.data)
        wire.end(request)
        assert_all_free_after_eviction(wire.pool)


async def test_a_birth_that_fails_on_the_way_is_never_visible_and_the_next_one_is_whole() -> None:
    async with wired() as wire:
        lost, again = Making(), Making()
        request = wire.expect(lost.final)
        reservation = wire.reservation(request)
        shipping = asyncio.create_task(wire.shipper.ship(lost.newborn, reservation, _endpoint(wire)))
        lost.write(0, 2)
        await until(_received(wire, 2))
        lost.newborn.fail("not finite")
        with pytest.raises(SourceLostError, match="not finite"):
            await shipping
        assert wire.committed == []
        again.write(0, CHUNKS)
        await wire.shipper.ship(again.newborn.whole(), reservation, _endpoint(wire))
        assert wire.committed == [again.final.key]
        assert wire.resident_bytes(again.final) == bytes(again.final.data)
        [link] = wire.links()
        await until(lambda: link.idle)
        assert link.outstanding_bytes == 0
        wire.end(request)
        assert_all_free_after_eviction(wire.pool)


def _endpoint(wire: Wire) -> KvEndpoint:
    return KvEndpoint(zmq_address=wire.relay.address)


def _received(wire: Wire, chunks: int) -> Callable[[], bool]:
    return lambda: sum(pair.stats.chunks_total for pair in wire.receiver.pairs.all()) >= chunks
