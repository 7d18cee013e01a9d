"""How a process begins: settings are read, logs set up, the model folder found, the event loop run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from shared import logs
from shared.model.catalog import ModelError, display_name, resolve_model
from shared.runtime import App, run_app
from shared.settings import ProcessSettings


def serve(
    settings: ProcessSettings, model: str, model_name: str, make_app: Callable[[Path, str], App], **bound: str
) -> None:
    """Runs a process until it is told to stop; exits with 1 and a reason when it cannot start.

    Args:
        settings: Typed settings.
        model: Model to resolve into a folder.
        model_name: Name that clients ask for; empty takes the model's own.
        make_app: Makes the app of a folder and a name; loads what it needs.
        bound: Fields of every log line (role, worker_id).
    """
    # gRPC's own lines are not JSON; what matters of them reaches us as statuses.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logs.configure(settings.log_level, settings.log_format, **bound)
    log = logs.get("start")
    try:
        folder = resolve_model(model, lambda said: log.info("model", detail=said))
        app = make_app(folder, model_name or display_name(model))
    except (ModelError, ValueError, OSError) as error:
        log.critical("cannot_start", reason=str(error))
        sys.exit(1)
    uvloop.run(run_app(app, settings))
