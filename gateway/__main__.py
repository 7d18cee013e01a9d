"""`python -m gateway`: one gateway, alone."""

from __future__ import annotations

from pathlib import Path

from gateway.settings import GatewaySettings
from shared.process_main import serve
from shared.runtime import App


def main() -> None:
    """Reads settings and serves until told to stop."""
    settings = GatewaySettings.from_command_line("python -m gateway")

    def make(folder: Path, name: str) -> App:
        from gateway.app import GatewayApp

        return GatewayApp(settings, folder, name)

    serve(settings, settings.model, settings.model_name, make, role="gateway", worker_id="gateway")


if __name__ == "__main__":
    main()
