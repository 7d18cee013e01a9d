"""`python -m decode_worker`: one decode worker, alone."""

from __future__ import annotations

from pathlib import Path

from decode_worker.receiving.heap import keep_frames_on_heap
from decode_worker.settings import DecodeSettings
from shared.process_main import serve
from shared.runtime import App


def main() -> None:
    """Reads settings and serves until told to stop."""
    settings = DecodeSettings.from_command_line("python -m decode_worker")
    keep_frames_on_heap()

    def make(folder: Path, name: str) -> App:
        # torch loads here and not at import, so that --help and bad flags answer at once.
        import torch

        from decode_worker.app import DecodeApp

        if settings.threads:
            torch.set_num_threads(settings.threads)
        return DecodeApp(settings, folder, name)

    serve(settings, settings.model, settings.model_name, make, role="decode", worker_id=settings.worker_id)


if __name__ == "__main__":
    main()
