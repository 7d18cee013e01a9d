"""All three roles in one process, over real sockets: for the exactness gate and for tests.

Needs the server packages. The product runs the roles as processes of their own (`drystone serve`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from decode_worker.app import DecodeApp
    from decode_worker.runner import LogitTrace
    from gateway.app import GatewayApp
    from prefill_worker.app import PrefillApp


@dataclass(slots=True)
class InProcessStack:
    """A gateway, prefill workers and decode workers on loopback; an async context manager.

    Args:
        folder: Local model folder.
        name: Name that clients ask for.
        dtype: Type of weights and KV.
        prefill: Prefill workers.
        decode: Decode workers.
        trace: Sees the logits of every row that a decode worker runs.
        decode_settings: More settings of each decode worker.
        prefill_settings: More settings of each prefill worker.
        gateway_settings: More settings of the gateway.
        store: Folder in which each prefill worker keeps blocks and records, in one of its own. None: on no disk.
    """

    folder: Path
    name: str = "model"
    dtype: str = "float32"
    prefill: int = 1
    decode: int = 1
    trace: LogitTrace | None = None
    decode_settings: dict[str, Any] = field(default_factory=dict)
    prefill_settings: dict[str, Any] = field(default_factory=dict)
    gateway_settings: dict[str, Any] = field(default_factory=dict)
    store: Path | None = None
    prefill_apps: list[PrefillApp] = field(default_factory=list)
    decode_apps: list[DecodeApp] = field(default_factory=list)
    gateway_app: GatewayApp | None = None

    @property
    def address(self) -> str:
        """The gateway's gRPC address, host:port."""
        if self.gateway_app is None:
            raise RuntimeError("the stack has not been started")
        return self.gateway_app.server.address

    @property
    def _workers(self) -> list[DecodeApp | PrefillApp]:
        return [*self.decode_apps, *self.prefill_apps]

    async def __aenter__(self) -> Self:
        """Loads the model once for each worker and serves."""
        from decode_worker.app import DecodeApp
        from decode_worker.settings import DecodeSettings
        from gateway.app import GatewayApp
        from gateway.settings import GatewaySettings
        from prefill_worker.app import PrefillApp
        from prefill_worker.settings import PrefillSettings

        decode: dict[str, Any] = {"dtype": self.dtype, **self.decode_settings}
        prefill: dict[str, Any] = {"dtype": self.dtype, **self.prefill_settings}
        try:
            for index in range(self.decode):
                settings = DecodeSettings(worker_id=f"decode-{index}", **decode)
                self.decode_apps.append(
                    await asyncio.to_thread(DecodeApp, settings, self.folder, self.name, self.trace)
                )
            for index in range(self.prefill):
                name = f"prefill-{index}"
                disk: dict[str, Any] = {} if self.store is None else {"disk_path": self.store / name}
                own = PrefillSettings(worker_id=name, **disk, **prefill)
                self.prefill_apps.append(await asyncio.to_thread(PrefillApp, own, self.folder, self.name))
            workers = [(await app.start())["grpc_address"] for app in self._workers]
            gateway = GatewaySettings(
                decode_workers=workers[: self.decode], prefill_workers=workers[self.decode :], **self.gateway_settings
            )
            self.gateway_app = await asyncio.to_thread(GatewayApp, gateway, self.folder, self.name)
            await self.gateway_app.start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything, the gateway first."""
        await self._stop()

    async def _stop(self) -> None:
        if self.gateway_app is not None:
            await self.gateway_app.stop(0.0)
        for app in self._workers:
            await app.stop(0.0)
