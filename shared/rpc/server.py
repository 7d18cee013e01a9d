"""One gRPC server as every process runs it: health, reflection, limits, errors, drain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from shared.rpc.errors import ErrorInterceptor
from shared.settings import ProcessSettings

Register = Callable[[grpc.aio.Server], None]


class RpcServer:
    """A grpc.aio server bound to one address.

    Args:
        settings: Address and limits.
        register: Adds services to the server.
        services: Full names of those services, for health and reflection.
    """

    def __init__(self, settings: ProcessSettings, register: Register, services: Sequence[str]) -> None:
        self._settings = settings
        self._services = ["", *services]
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            self._server,
        )
        self.address = ""

    async def start(self) -> str:
        """Serves; returns the bound address as host:port. Raises OSError when it cannot bind."""
        host, wanted = self._settings.host, self._settings.port
        try:
            port = self._server.add_insecure_port(f"{host}:{wanted}")
        except RuntimeError as error:
            raise OSError(f"cannot serve gRPC on {host}:{wanted}: {error}") from error
        await self._server.start()
        self.address = f"{host}:{port}"
        return self.address

    async def set_serving(self, *, serving: bool) -> None:
        """Tells health checks whether new work is taken."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)

    async def stop(self, grace_seconds: float) -> None:
        """Says NOT_SERVING, lets running calls end within the grace, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)
