"""How busy others kept the machine during a measurement: figures of a shared machine are worth what this says."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")
# Fields of /proc/stat that are no work: idle, iowait.
_IDLE = slice(3, 5)
# user, nice, system, idle, iowait, irq, softirq, steal; guest times are in user already.
_COUNTED = 8


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU time so far, in seconds.

    Args:
        at: Moment, of the monotonic clock.
        machine: Of everything on every core.
        ours: Of this process and all its descendants.
    """

    at: float
    machine: float
    ours: float

    @classmethod
    def now(cls) -> Self:
        """Reads the kernel's counters."""
        total, *_ = Path("/proc/stat").read_text().splitlines()
        fields = [int(field) for field in total.split()[1 : 1 + _COUNTED]]
        machine = (sum(fields) - sum(fields[_IDLE])) / _TICKS
        parents: dict[int, int] = {}
        used: dict[int, float] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # The name, which may hold anything, is in brackets; state, ppid, … follow.
                after = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            process = int(folder.name)
            parents[process] = int(after[1])
            used[process] = (int(after[11]) + int(after[12])) / _TICKS
        return cls(time.monotonic(), machine, sum(used[process] for process in _tree(os.getpid(), parents)))

    def others_since(self, before: CpuTimes) -> float:
        """Cores that others kept busy since `before`, on average."""
        others = (self.machine - before.machine) - (self.ours - before.ours)
        return max(0.0, others) / (self.at - before.at)


def _tree(root: int, parents: Mapping[int, int]) -> set[int]:
    """A process and all its descendants."""
    members = {root}
    while more := {process for process, parent in parents.items() if parent in members} - members:
        members |= more
    return members
