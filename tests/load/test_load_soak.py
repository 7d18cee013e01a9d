"""A short soak: nothing is held at the end, and everyone was answered or left."""

from __future__ import annotations

from tests.conftest import MakeFolder
from tests.load.soak import Soak
from tests.support.stacks import serving


async def test_requests_that_come_and_leave_hold_nothing_at_the_end(tiny_folder: MakeFolder) -> None:
    decode = {"pool_bytes": 8 << 20, "max_waiting": 64}
    async with serving(tiny_folder(), decode_settings=decode, prefill_settings={"ram_bytes": 8 << 20}) as served:
        soaking = Soak(served, seed=3, concurrency=16)
        await soaking.run(150)
        assert set(soaking.outcomes) == {"answered", "left"}
        assert soaking.outcomes["answered"] > 60
        await served.until_idle()
