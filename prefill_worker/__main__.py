"""`python -m prefill_worker`: one prefill worker, alone."""

from __future__ import annotations

from pathlib import Path

from prefill_worker.settings import PrefillSettings
from shared.process_main import serve
from shared.runtime import App


def main() -> None:
    """Reads settings and serves until told to stop."""
    settings = PrefillSettings.from_command_line("python -m prefill_worker")

    def make(folder: Path, name: str) -> App:
        # torch loads here and not at import, so that --help and bad flags answer at once.
        import torch

        from prefill_worker.app import PrefillApp

        if settings.threads:
            torch.set_num_threads(settings.threads)
        return PrefillApp(settings, folder, name)

    serve(settings, settings.model, settings.model_name, make, role="prefill", worker_id=settings.worker_id)


if __name__ == "__main__":
    main()
