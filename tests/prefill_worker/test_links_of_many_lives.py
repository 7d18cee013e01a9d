"""Links end with the life of the worker that they lead to; odd addresses harm nobody."""

from __future__ import annotations

import asyncio

import pytest

from prefill_worker.batch_queue import Urgency
from prefill_worker.encoder import Encoder
from prefill_worker.transfer.shipper import Shipper
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import KvEndpoint, Reservation, WorkerIdentity
from shared.runtime import cancelled
from tests.support.fake_workers import compatibility
from tests.support.stacks import until
from tests.support.wire import SENDER, SHAPE, make_block

ODD = ["", "inproc://x", "ipc:///tmp/x", "tcp://", "tcp://host:notaport", "tcp://[::", "x" * 9000]


@pytest.mark.parametrize("address", ODD)
async def test_an_odd_address_fails_its_transfer_and_the_shipper_still_closes(address: str) -> None:
    shipper = Shipper(SENDER, compatibility(), SHAPE, 0.2)
    reservation = Reservation(worker=WorkerIdentity(worker_id="d", incarnation=1), reservation_id=1, epoch=1)
    with pytest.raises(DrystoneError):
        await shipper.ship(make_block(1), reservation, KvEndpoint(zmq_address=address))
    async with asyncio.timeout(5):
        await shipper.close()


async def test_encoding_pauses_while_too_much_waits_to_be_shipped(served: ServedModel) -> None:
    encoder = Encoder(
        served,
        lambda _: None,
        max_queued_blocks=100,
        max_queued_tokens=1000,
        max_unshipped_bytes=1,
        batch_tokens=100,
    )
    running = asyncio.create_task(encoder.run())
    first, _ = encoder.request(b"1" * 32, [5, 6, 7], store=False, urgency=Urgency.NORMAL)
    second, _ = encoder.request(b"2" * 32, [5, 6, 8], store=False, urgency=Urgency.NORMAL)
    await first.done
    await asyncio.sleep(0.1)
    assert not second.done.done()
    encoder.leave(first)
    await until(second.done.done)
    encoder.leave(second)
    assert encoder._unshipped_bytes == 0
    await cancelled(running)
