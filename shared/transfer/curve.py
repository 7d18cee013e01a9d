"""Security of the KV plane: who may send to a decode worker, and whom a prefill worker sends to.

    receiver has a key file    CURVE; a sender that has none, or whose key is not allowed, is refused, and refuses
    receiver has none          in the clear; off loopback either end refuses, unless --kv-allow-cleartext

Unix-domain sockets are in the clear always: the folder that they lie in is their owner's alone.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import zmq

from shared import logs
from shared.errors import DrystoneError, Reason
from shared.settings import WorkerSettings
from shared.transfer.handshakes import Handshake
from shared.transfer.keys import AllowedKeys, KeyPair, is_key, load_key_pair, shown
from shared.transfer.reactor import Reactor
from shared.transfer.zap import DOMAIN, ZapHandler

# Between two log lines of the same denial: whoever knocks all the time must not fill the log.
_LOG_SECONDS = 10.0
_UNKNOWN_KEY = "unknown_key"
_WAYS_OUT = (
    "make keys with `drystone keys new` and set --kv-key-file and --kv-allowed-keys-file (docs/security.md), "
    "or set --kv-allow-cleartext where only Drystone's processes reach that network"
)


def is_loopback(host: str) -> bool:
    """True for an address that no other machine reaches; names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(settings: WorkerSettings, host: str) -> None:
    """Refuses to receive KV in the clear where other machines can reach it.

    Raises:
        ValueError: Says which setting, and the two ways out.
    """
    if settings.kv_key_file is None and not settings.kv_allow_cleartext and not is_loopback(host):
        raise ValueError(f"kv_host: {host} is not loopback, and KV would be received in the clear: {_WAYS_OUT}")


class ServerSecurity:
    """Keys of a decode worker, and who may send to it. Used on the receiving thread, once attached.

    Args:
        keys: Its own.
        allowed: Senders that may connect.
        on_denied: Told why, of each connection that was not let in.

    Attributes:
        denied: Connections not let in, by reason: unknown_key, no_key, wrong_key, broken_off, malformed.
    """

    def __init__(
        self, keys: KeyPair, allowed: AllowedKeys, on_denied: Callable[[str], None] = lambda _reason: None
    ) -> None:
        self._keys = keys
        self._allowed = allowed
        self._on_denied = on_denied
        self._logged_at: dict[str, float] = {}
        self._unlogged: Counter[str] = Counter()
        self._log = logs.get("kv-security")
        self.denied: Counter[str] = Counter()

    @property
    def public_key(self) -> str:
        """What senders must know of it, in Z85."""
        return self._keys.public

    @property
    def denied_total(self) -> int:
        """Connections not let in since the start."""
        return self.denied.total()

    def attach(self, reactor: Reactor) -> None:
        """Answers for every socket of the reactor's context, on its thread. Before any of them is bound."""
        handler = ZapHandler(reactor.context, self._allows)
        reactor.register(handler.socket, handler.read)

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Makes a socket ready to be bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        # Without a handler for this domain nobody is let in; by default everybody would be.
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def handshake(self, ended: Handshake, address: str) -> None:
        """Notes how a handshake at a listener's address ended."""
        # Of keys that are not allowed the handler knows more.
        if ended not in (Handshake.DONE, Handshake.NOT_ALLOWED):
            self._deny(ended.value, listener=address)

    def _allows(self, key: str, address: str) -> bool:
        name = self._allowed.name(key)
        if name is None:
            self._deny(_UNKNOWN_KEY, peer=address, key=shown(key))
            return False
        self._log.info("sender_let_in", peer=address, key=shown(key), name=name)
        return True

    def _deny(self, reason: str, **facts: str) -> None:
        self.denied[reason] += 1
        self._on_denied(reason)
        now = time.monotonic()
        if now - self._logged_at.get(reason, -_LOG_SECONDS) < _LOG_SECONDS:
            self._unlogged[reason] += 1
            return
        self._logged_at[reason] = now
        self._log.warning("connection_denied", reason=reason, more_before=self._unlogged.pop(reason, 0), **facts)


class ClientSecurity:
    """Keys of a prefill worker, and whom it sends to. Used on the sending thread.

    Args:
        keys: Its own; None sends in the clear only.
        allowed: Receivers that may be sent to; with keys.
        allow_cleartext: Send in the clear to other machines too.
    """

    def __init__(self, keys: KeyPair | None, allowed: AllowedKeys | None, *, allow_cleartext: bool = False) -> None:
        self._keys = keys
        self._allowed = allowed
        self._allow_cleartext = allow_cleartext

    def check(self, address: str, server_key: str) -> None:
        """Refuses a receiver that may not be sent to.

        Args:
            address: Chosen one, such as "tcp://10.0.0.7:7701".
            server_key: The receiver's public key, as it was told; empty for none.

        Raises:
            DrystoneError: KV_KEY_REFUSED.
        """
        if address.startswith("ipc://"):
            return
        if not server_key:
            host = address.removeprefix("tcp://").rpartition(":")[0]
            if not (self._allow_cleartext or is_loopback(host)):
                raise _refused(f"{address[:200]} is not loopback, and that decode worker has no key: {_WAYS_OUT}")
        elif not is_key(server_key):
            raise _refused("what was told as the decode worker's public key is none")
        elif self._keys is None or self._allowed is None:
            raise _refused(
                "that decode worker takes KV under CURVE, and this worker has no key: set --kv-key-file and "
                "--kv-allowed-keys-file"
            )
        elif self._allowed.name(server_key) is None:
            raise _refused(f"the decode worker's public key {shown(server_key)}... is not in {self._allowed.file}")

    def apply(self, socket: zmq.Socket[bytes], address: str, server_key: str) -> None:
        """Makes a socket ready to connect. Raises DrystoneError as `check` does."""
        self.check(address, server_key)
        if server_key and self._keys is not None and not address.startswith("ipc://"):
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
            socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode())


def server_security(settings: WorkerSettings, on_denied: Callable[[str], None]) -> ServerSecurity | None:
    """A decode worker's security; None where it has no key file.

    Raises:
        ValueError: A file cannot be used, or one of the two settings is missing.
    """
    files = _files(settings)
    return None if files is None else ServerSecurity(load_key_pair(files[0]), AllowedKeys(files[1]), on_denied)


def client_security(settings: WorkerSettings) -> ClientSecurity:
    """A prefill worker's security. Raises ValueError as `server_security` does."""
    files = _files(settings)
    keys, allowed = (None, None) if files is None else (load_key_pair(files[0]), AllowedKeys(files[1]))
    return ClientSecurity(keys, allowed, allow_cleartext=settings.kv_allow_cleartext)


def not_let_in(worker_id: str, ended: Handshake) -> DrystoneError:
    """Why a link to a decode worker fails in its handshake."""
    raise_as = Reason.KV_KEY_REFUSED
    match ended:
        case Handshake.NOT_ALLOWED:
            said = "this worker's key is not among those that it allows"
        case Handshake.MECHANISM:
            said = "one of the two encrypts and the other does not"
        case Handshake.MALFORMED:
            raise_as, said = Reason.TRANSFER_FAILED, "what came in the handshake could not be read"
        case _:
            said = "handshakes break off again and again, as when it has another key than was told"
    return DrystoneError(
        raise_as,
        f"decode worker {worker_id[:200]} did not let this worker in: {said}",
        metadata={"handshake": ended.value},
    )


def _files(settings: WorkerSettings) -> tuple[Path, Path] | None:
    own, allowed = settings.kv_key_file, settings.kv_allowed_keys_file
    if own is None and allowed is None:
        return None
    if own is None:
        raise ValueError(
            "kv_allowed_keys_file is set and kv_key_file is not: without a key of its own no worker is asked for one"
        )
    if allowed is None:
        raise ValueError(
            "kv_key_file is set and kv_allowed_keys_file is not: whoever connects would be let in; list the keys of "
            "the other workers there, one line of `drystone keys show` each"
        )
    return own, allowed


def _refused(message: str) -> DrystoneError:
    return DrystoneError(Reason.KV_KEY_REFUSED, message)
