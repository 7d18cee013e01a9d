"""CURVE between two ends over real sockets: who gets in, who does not, and how each of them hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from decode_worker.settings import DecodeSettings
from prefill_worker.settings import PrefillSettings
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import KvEndpoint
from shared.runtime import host_name
from shared.transfer.curve import ClientSecurity, check_bind, client_security, is_loopback, server_security
from shared.transfer.endpoints import chosen_address
from shared.transfer.reactor import Reactor
from tests.support.curve_parts import Ends, Keys, ends, telling_no_secret
from tests.support.stacks import until
from tests.support.wire import make_block

CLEAR = ClientSecurity(None, None)
# Far below the greeting's five seconds: a refusal is told, not waited for. No timing is measured beyond that.
SOON = 4.0


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


async def refused(both: Ends, endpoint: KvEndpoint, said: str) -> DrystoneError:
    """Ships a block that must not arrive; returns why, which came sooner than any timeout."""
    began = time.monotonic()
    with pytest.raises(DrystoneError, match=said) as caught:
        await both.ship(make_block(1), endpoint)
    assert time.monotonic() - began < SOON
    assert caught.value.reason == Reason.KV_KEY_REFUSED
    assert not both.committed
    assert both.shipper.outcomes == {"kv_key_refused": 1}
    return caught.value


async def test_those_who_allow_each_other_exchange_kv(keys: Keys) -> None:
    server = keys.server("sender")
    with telling_no_secret(keys):
        async with ends(server, keys.client()) as both:
            block = make_block(1)
            await both.ship(block, both.endpoint(server.public_key))
            [resident] = both.pool.blocks.all()
            assert both.pool.arena.bytes_of(resident.extent).numpy().tobytes() == bytes(block.data)
            assert both.committed == [block.key]
            assert [pair.curve for pair in both.shipper.pairs()] == [True]
            assert [pair.curve for pair in both.receiver.pairs.statuses()] == [True]
            assert server.denied_total == both.shipper.handshakes_failed == 0


async def test_a_sender_that_is_not_allowed_is_told_at_once(keys: Keys) -> None:
    server = keys.server("somebody")
    with telling_no_secret(keys) as lines:
        async with ends(server, keys.client()) as both:
            await refused(both, both.endpoint(server.public_key), "not among those that it allows")
            assert both.shipper.handshakes_failed == 1
            assert server.denied == {"unknown_key": 1}
            assert both.receiver.denied_total == 1
    [line] = [line for line in lines if line["event"] == "connection_denied"]
    assert (line["reason"], line["peer"]) == ("unknown_key", "127.0.0.1")
    assert line["key"] == keys.pair("sender").public[:8]
    assert any(line["event"] == "link_broken" for line in lines)


async def test_a_receiver_with_another_key_than_told_gets_nothing(keys: Keys) -> None:
    server = keys.server("sender")
    with telling_no_secret(keys) as lines:
        async with ends(server, keys.client()) as both:
            await refused(both, both.endpoint(keys.pair("stranger").public), "another key than was told")
            await until(lambda: server.denied["wrong_key"] >= 3)
            assert server.denied.keys() == {"wrong_key"}
    # The second and third are counted and not logged.
    assert sum(line["event"] == "connection_denied" for line in lines) == 1


def in_the_clear(dealer: zmq.Socket[bytes]) -> None:
    del dealer


def by_password(dealer: zmq.Socket[bytes]) -> None:
    dealer.setsockopt_string(zmq.PLAIN_USERNAME, "me")
    dealer.setsockopt_string(zmq.PLAIN_PASSWORD, "let me in")


@pytest.mark.parametrize("mechanism", [in_the_clear, by_password])
async def test_peers_of_another_mechanism_are_dropped_and_counted(
    mechanism: Callable[[zmq.Socket[bytes]], None], keys: Keys
) -> None:
    server = keys.server("sender")
    with telling_no_secret(keys), zmq.Context() as context:
        async with ends(server, None) as both:
            with context.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.LINGER, 0)
                mechanism(dealer)
                dealer.connect(both.listener.address)
                dealer.send(b"hello")
                await until(lambda: server.denied_total > 0)
            # Whichever of the two noticed first: the other sees a connection that broke off.
            assert server.denied.keys() <= {"no_key", "broken_off"}
            assert both.receiver.refused_total == 0  # nothing of it reached the receiver


async def test_a_sender_in_the_clear_is_told_that_the_other_end_encrypts(keys: Keys) -> None:
    async with ends(keys.server("sender"), CLEAR) as both:
        await refused(both, both.endpoint(""), "one of the two encrypts|could not be|let this worker in")


async def test_a_receiver_in_the_clear_gets_nothing_from_a_sender_that_was_told_a_key(keys: Keys) -> None:
    async with ends(None, keys.client()) as both:
        await refused(both, both.endpoint(keys.pair("receiver").public), "did not let this worker in")


async def test_who_is_allowed_changes_while_it_runs(keys: Keys) -> None:
    server = keys.server("somebody")
    async with ends(server, keys.client()) as both:
        endpoint = both.endpoint(server.public_key)
        await refused(both, endpoint, "not among")
        keys.allowed("receiver", ["somebody", "sender"])
        await both.ship(make_block(2), endpoint)
        # The sender's own file counts for a link that is open too.
        keys.allowed("sender", ["stranger"])
        with pytest.raises(DrystoneError, match=r"public key \S{8}\.\.\. is not in .*sender.allowed"):
            await both.ship(make_block(3), endpoint)
        assert len(both.committed) == 1


async def test_loopback_and_unix_domain_need_no_keys(keys: Keys) -> None:
    async with ends(None, CLEAR) as both:
        await both.ship(make_block(1), both.endpoint())
        assert both.committed
    folder = keys.folder / "own"
    folder.mkdir(mode=0o700)
    async with ends(keys.server("sender"), CLEAR, f"ipc://{folder / 'kv.sock'}") as both:
        endpoint = KvEndpoint(
            zmq_address="tcp://192.0.2.1:1",
            ipc_address=both.listener.address,
            host=host_name(),
            curve_public_key=keys.pair("receiver").public,
        )
        await both.ship(make_block(1), endpoint)
        assert [pair.transport for pair in both.shipper.pairs()] == ["zmq-ipc"]


def test_a_unix_domain_socket_counts_only_where_nobody_else_can_put_one(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o700)
    path = folder / "kv.sock"
    told = KvEndpoint(zmq_address="tcp://h:1", ipc_address=f"ipc://{path}", host=host_name())
    assert chosen_address(told) == "tcp://h:1"  # there is none
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        assert chosen_address(told) == told.ipc_address
        folder.chmod(0o770)
        assert chosen_address(told) == "tcp://h:1"
    folder.chmod(0o700)
    path.unlink()
    path.write_text("no socket")
    assert chosen_address(told) == "tcp://h:1"


@pytest.mark.parametrize(
    ("security", "address", "key", "said"),
    [
        ("none", "tcp://10.0.0.7:1", "", "is not loopback, and that decode worker has no key: .*--kv-allow-cleartext"),
        ("none", "tcp://127.0.0.1:1", "receiver", "set --kv-key-file and --kv-allowed-keys-file"),
        ("keys", "tcp://10.0.0.7:1", "", "is not loopback"),
        ("keys", "tcp://10.0.0.7:1", "somebody", "is not in .*sender.allowed"),
        ("keys", "tcp://10.0.0.7:1", "rubbish", "is none"),
        ("cleartext", "tcp://10.0.0.7:1", "receiver", "set --kv-key-file"),
        ("none", "tcp://[fe80::1]:1", "", "is not loopback"),
        ("none", "tcp://localhost.evil.example:1", "", "is not loopback"),
    ],
)
def test_a_sender_refuses_receivers_with_a_reason(security: str, address: str, key: str, said: str, keys: Keys) -> None:
    client = {"none": CLEAR, "keys": keys.client(), "cleartext": ClientSecurity(None, None, allow_cleartext=True)}
    told = key if key in ("", "rubbish") else keys.pair(key).public
    with pytest.raises(DrystoneError, match=said) as caught:
        client[security].check(address, told)
    assert caught.value.reason == Reason.KV_KEY_REFUSED


def test_a_sender_sends_in_the_clear_where_it_was_told_so() -> None:
    ClientSecurity(None, None, allow_cleartext=True).check("tcp://10.0.0.7:1", "")
    CLEAR.check("tcp://[::1]:1", "")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")),
        *((host, False) for host in ("10.0.0.7", "192.0.2.1", "decode-0", "127.1", "::2", "", "*")),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(host: str, loopback: bool) -> None:  # noqa: FBT001 - a parameter
    assert is_loopback(host) is loopback


def test_a_public_address_in_the_clear_needs_a_word_for_it(keys: Keys) -> None:
    with pytest.raises(ValueError, match=r"kv_host: 10\.0\.0\.7 .*--kv-key-file.*--kv-allow-cleartext"):
        check_bind(DecodeSettings(), "10.0.0.7")
    check_bind(DecodeSettings(), "127.0.0.1")
    check_bind(DecodeSettings(kv_allow_cleartext=True), "10.0.0.7")
    keys.pair("w")
    check_bind(DecodeSettings(kv_key_file=keys.file("w")), "10.0.0.7")


def test_half_of_the_settings_is_refused_with_the_way_out(keys: Keys) -> None:
    keys.pair("w")
    only_key: dict[str, Any] = {"kv_key_file": keys.file("w")}
    only_allowed: dict[str, Any] = {"kv_allowed_keys_file": keys.allowed("w", ["sender"])}
    for settings in (DecodeSettings(**only_key), PrefillSettings(**only_key)):
        with pytest.raises(ValueError, match="whoever connects would be let in; list the keys"):
            client_security(settings)
    with pytest.raises(ValueError, match="kv_key_file is not"):
        server_security(DecodeSettings(**only_allowed), lambda _reason: None)
    assert server_security(DecodeSettings(), lambda _reason: None) is None
    both = DecodeSettings(**only_key, **only_allowed)
    security = server_security(both, lambda _reason: None)
    assert security is not None
    assert security.public_key == keys.pair("w").public
    said = f"{both!r} {security!r} {vars(security)!r} {vars(client_security(both))!r}"
    assert not any(secret in said for secret in keys.secrets())


async def test_without_anybody_to_ask_nobody_is_let_in(keys: Keys) -> None:
    """Should the handler be gone, a socket refuses; it does not take everybody."""
    server, context, other = keys.server("sender"), zmq.Context(), zmq.Context()
    try:
        router, dealer = context.socket(zmq.ROUTER), other.socket(zmq.DEALER)
        server.apply(router)
        router.bind("tcp://127.0.0.1:0")
        address = router.getsockopt_string(zmq.LAST_ENDPOINT)
        keys.client().apply(dealer, address, server.public_key)
        dealer.connect(address)
        dealer.send(b"hello")
        assert not await asyncio.to_thread(router.poll, 500)
    finally:
        context.destroy(0)
        other.destroy(0)


def test_sockets_that_go_in_the_middle_of_handshakes_hold_up_nobody() -> None:
    """ZeroMQ's own thread waits for whoever should take an event; it must never wait for somebody who has left."""
    reactor, heard = Reactor("watched", lambda _now: 5.0), threading.Event()
    stopping = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def hang_up() -> None:
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        router = reactor.context.socket(zmq.ROUTER)
        router.bind("tcp://127.0.0.1:0")
        reactor.register(router, lambda: bool(router.poll(0) and router.recv_multipart()) and not heard.set())

        def knock(times: int) -> None:
            going = [reactor.context.socket(zmq.DEALER) for _ in range(20)]
            for one in going:
                one.setsockopt(zmq.RECONNECT_IVL, 1)
                reactor.watch(one, lambda _ended: None)
                one.connect(f"tcp://127.0.0.1:{server.getsockname()[1]}")
            time.sleep(0.005)
            for one in going:
                reactor.forget(one)
            if times:
                reactor.call(lambda: knock(times - 1))
            else:
                last.connect(router.getsockopt_string(zmq.LAST_ENDPOINT))
                last.send(b"still there")

        last = reactor.context.socket(zmq.DEALER)
        reactor.register(last, lambda: False)
        reactor.call(lambda: knock(4))
        reactor.start()
        try:
            assert heard.wait(10.0)
        finally:
            stopping.set()
            thread.join()
            assert reactor.stop()
    assert reactor.context.closed
