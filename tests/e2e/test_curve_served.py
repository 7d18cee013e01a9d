"""A whole stack whose KV travels under CURVE: it answers; with a key that is not allowed it says so, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from decode_worker.app import DecodeApp
from decode_worker.settings import DecodeSettings
from prefill_worker.app import PrefillApp
from prefill_worker.settings import PrefillSettings
from shared.errors import Reason
from shared.transfer.keys import make_key_file
from tests.conftest import MakeFolder
from tests.support.curve_parts import Keys, telling_no_secret
from tests.support.stacks import Served, serving

PROMPT: dict[str, Any] = {"blocks": ["A wall of dry stone.", "What is it?"], "max_new_tokens": 8}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def files(keys: Keys, name: str, *who: str) -> dict[str, Path]:
    """Settings of a worker that exchanges KV with these others."""
    keys.pair(name)
    return {"kv_key_file": keys.file(name), "kv_allowed_keys_file": keys.allowed(name, who)}


def over_tcp(served: Served) -> None:
    """Takes the Unix-domain address away, as if the workers were on two machines."""
    for app in served.stack.decode_apps:
        app._endpoint.ipc_address = ""


def counted(app: DecodeApp, reason: str) -> float | None:
    return app._metrics.registry.get_sample_value("drystone_kv_connections_denied_total", {"reason": reason})


async def figures(served: Served) -> dict[str, float]:
    """Figures of every worker, as `drystone status` shows them."""
    return {name: value for process in await served.client.status() for name, value in process.values.items()}


async def test_answers_under_curve_are_those_in_the_clear(tiny_folder: MakeFolder, keys: Keys) -> None:
    async with serving(tiny_folder()) as served:
        over_tcp(served)
        expected = await served.client.generate(**PROMPT)
        assert not [pair for process in await served.client.status() for pair in process.pairs if pair.curve]
    settings = {
        "decode_settings": files(keys, "decode-0", "prefill-0"),
        "prefill_settings": files(keys, "prefill-0", "decode-0"),
    }
    with telling_no_secret(keys) as lines:
        async with serving(tiny_folder(), **settings) as served:
            over_tcp(served)
            answer = await served.client.generate(**PROMPT)
            assert answer.token_ids == expected.token_ids
            assert answer.blocks[0].source == "encoded"
            assert answer.usage.shipped_bytes == expected.usage.shipped_bytes > 0
            pairs = [pair for process in await served.client.status() for pair in process.pairs]
            assert [(pair.transport, pair.curve) for pair in pairs] == [("zmq-tcp", True)] * 2
            said = await figures(served)
            assert (said["connections_denied_total"], said["handshakes_failed_total"]) == (0, 0)
    assert [line["name"] for line in lines if line["event"] == "sender_let_in"] == ["prefill-0"]


async def test_a_worker_that_is_not_allowed_is_refused_and_the_request_is_answered(
    tiny_folder: MakeFolder, keys: Keys
) -> None:
    async with serving(tiny_folder(), prefill=0) as served:
        expected = await served.client.generate(**PROMPT)
    settings = {
        "decode_settings": files(keys, "decode-0", "somebody"),
        "prefill_settings": files(keys, "prefill-0", "decode-0"),
    }
    with telling_no_secret(keys) as lines:
        async with serving(tiny_folder(), **settings) as served:
            over_tcp(served)
            answer = await served.client.generate(**PROMPT)
            assert answer.token_ids == expected.token_ids
            assert answer.blocks[0].source == "encoded_on_decode"
            [attempt] = answer.blocks[0].failed_attempts
            assert attempt.startswith(f"prefill-0: {Reason.KV_KEY_REFUSED}: decode worker decode-0 did not let")
            [decode], [prefill] = served.stack.decode_apps, served.stack.prefill_apps
            assert decode.receiver.received_bytes == 0
            assert counted(decode, "unknown_key") == 1
            outcome = {"outcome": "kv_key_refused"}
            assert prefill._metrics.registry.get_sample_value("drystone_kv_transfers_total", outcome) == 1
            said = await figures(served)
            assert (said["connections_denied_total"], said["handshakes_failed_total"]) == (1, 1)
            # Let in while both run: the next request's block comes from the prefill worker.
            keys.allowed("decode-0", ["prefill-0"])
            served.evict_everywhere()
            assert (await served.client.generate(**PROMPT)).blocks[0].source == "encoded"
    assert [line["reason"] for line in lines if line["event"] == "connection_denied"] == ["unknown_key"]


async def test_a_decode_worker_without_keys_gets_nothing_from_one_that_may_not_send_in_the_clear(
    tiny_folder: MakeFolder,
) -> None:
    async with serving(tiny_folder()) as served:
        over_tcp(served)
        for app in served.stack.decode_apps:  # an address of another machine, as far as anybody can see
            app._endpoint.zmq_address = "tcp://192.0.2.1:7701"
        answer = await served.client.generate(**PROMPT)
        assert answer.blocks[0].source == "encoded_on_decode"
        assert "--kv-allow-cleartext" in answer.blocks[0].failed_attempts[0]


def test_workers_that_would_be_insecure_do_not_start(tiny_folder: MakeFolder, keys: Keys) -> None:
    folder = tiny_folder()
    with pytest.raises(ValueError, match=r"kv_host: .*in the clear: make keys with"):
        DecodeApp(DecodeSettings(kv_host="192.0.2.1"), folder, "m")
    make_key_file(keys.file("w"))
    with pytest.raises(ValueError, match="kv_allowed_keys_file is not"):
        PrefillApp(PrefillSettings(kv_key_file=keys.file("w")), folder, "m")
    keys.file("w").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        DecodeApp(
            DecodeSettings(kv_key_file=keys.file("w"), kv_allowed_keys_file=keys.allowed("w", ["x"])), folder, "m"
        )


async def test_an_address_that_is_taken_leaves_nothing_open(tiny_folder: MakeFolder, keys: Keys) -> None:
    async with serving(tiny_folder()) as served:
        port = int(served.stack.decode_apps[0]._endpoint.zmq_address.rpartition(":")[2])
        settings = DecodeSettings(kv_port=port, pool_bytes=32 << 20, **files(keys, "decode-1", "prefill-0"))
        app = DecodeApp(settings, tiny_folder(), "m")
        with pytest.raises(OSError, match="cannot receive KV"):
            await app.start()
        assert app.receiver.context.closed
