"""Drystone for a comparison: the decode worker on the engine's core, everything else on the helper's."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from drystone.local import commands
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor
from tests.load.peers.peer import Cores


class DrystoneServer:
    """`drystone serve` with each process pinned; a context manager.

    Args:
        model: Hugging Face folder, bfloat16.
        threads: torch threads of each worker.
        cores: Where they run.
        log: File that the processes' output goes to.
    """

    def __init__(self, model: Path, threads: int, cores: Cores, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w", encoding="utf-8")

        def command(role: str, index: int) -> list[str]:
            core = cores.engine if role == "decode" else cores.helper
            return ["taskset", "-c", str(core), *commands.program(role, index)]

        def report(line: str) -> None:
            print(line, file=self._log, flush=True)

        options = ServeOptions(model=str(model), dtype="bfloat16", port=0, threads=threads)
        self._supervisor = Supervisor(options, report=report, command=command)

    @property
    def address(self) -> str:
        """The gateway's host:port."""
        return self._supervisor.address

    def __enter__(self) -> Self:
        """Starts.

        Raises:
            SupervisorError: A process died, or was not ready in time.
        """
        try:
            self._supervisor.start()
        except BaseException:
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops."""
        self._supervisor.stop()
        self._log.close()
