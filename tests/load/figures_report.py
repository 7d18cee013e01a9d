"""What was measured, as tables for people and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.load.bandwidth import Floor
from tests.load.goals import Figures, Goal

# Figure, what it says, its factor for people, decimals.
_ROWS: Final[Sequence[tuple[str, str, float, int]]] = (
    ("prompt_tokens", "prompt, tokens", 1, 0),
    ("ttft_cold", "TTFT cold, ms", 1e3, 0),
    ("ttft_again", "TTFT same order, another question, ms", 1e3, 0),
    ("ttft_shuffled", "TTFT shuffled, another question, ms", 1e3, 0),
    ("cached_cold", "cached tokens, cold", 1, 0),
    ("cached_again", "cached tokens, same order", 1, 0),
    ("cached_shuffled", "cached tokens, shuffled", 1, 0),
    ("itl", "ITL, one stream, ms", 1e3, 1),
    ("eight_fresh_whole", "8 streams, fresh, tokens/s with prefill", 1, 1),
    ("eight_resident_whole", "8 streams, resident, tokens/s with prefill", 1, 1),
    ("eight_resident_ttft", "8 streams, resident, TTFT, ms", 1e3, 0),
    ("eight_resident_decode", "8 streams, tokens/s, decode alone", 1, 1),
    ("one_whole", "one stream, resident, tokens/s with prefill", 1, 1),
    ("sixteen_whole", "16 requests, tokens/s with prefill", 1, 1),
    ("sixteen_decode", "16 requests, tokens/s, decode alone", 1, 1),
    ("others", "cores busy with others meanwhile", 1, 2),
)


@dataclass(frozen=True, slots=True)
class SystemFigures:
    """One system's part of the report.

    Args:
        version: Its version.
        setting: What it ran with.
        figures: What was measured, in seconds, tokens and tokens a second.
        note: What went wrong, or was left out; empty when nothing.
    """

    version: str
    setting: str
    figures: Figures
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """One run.

    Args:
        machine: What it ran on.
        systems: By name, Drystone first.
        skipped: Peers that did not run, and why.
        floor: Least time of a decode step of one stream.
        goals: Goals and whether they are met.
    """

    machine: Mapping[str, str]
    systems: Mapping[str, SystemFigures]
    skipped: Mapping[str, str]
    floor: Floor
    goals: Sequence[Goal]

    def print(self, console: Console) -> None:
        """Prints the tables."""
        console.print("  ".join(f"{name}: {value}" for name, value in self.machine.items()), highlight=False)
        for name, system in self.systems.items():
            note = f"  [{system.note}]" if system.note else ""
            console.print(f"{name} {system.version}: {system.setting}{note}", highlight=False, markup=False)
        for name, reason in self.skipped.items():
            console.print(f"{name}: skipped: {reason}", highlight=False, markup=False)
        console.print(self._figures_table())
        gigabytes = self.floor.bytes_per_second / 1e9
        console.print(
            f"decode floor of one stream: {self.floor.seconds * 1e3:.1f} ms at {gigabytes:.1f} GB/s read by one core",
            highlight=False,
        )
        console.print(self._goals_table())

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values: seconds, tokens, tokens a second."""
        systems = {
            name: {
                "version": system.version,
                "setting": system.setting,
                "note": system.note,
                "figures": {
                    figure: {"median": spread.median, "quartiles": spread.quartiles, "count": len(spread.values)}
                    for figure, spread in system.figures.items()
                },
            }
            for name, system in self.systems.items()
        }
        return {
            "machine": dict(self.machine),
            "systems": systems,
            "skipped": dict(self.skipped),
            "floor": asdict(self.floor) | {"seconds": self.floor.seconds},
            "goals": [asdict(goal) | {"met": goal.met} for goal in self.goals],
        }

    def _figures_table(self) -> Table:
        table = Table("median (quartiles)", title="figures", title_justify="left")
        for name in self.systems:
            table.add_column(name, justify="right")
        for figure, text, factor, decimals in _ROWS:
            cells = []
            for system in self.systems.values():
                spread = system.figures.get(figure)
                if spread is None:
                    cells.append("")
                    continue
                low, high = (f"{value * factor:,.{decimals}f}" for value in spread.quartiles)
                cells.append(f"{spread.median * factor:,.{decimals}f} ({low}-{high})")
            if any(cells):
                table.add_row(text, *cells)
        return table

    def _goals_table(self) -> Table:
        table = Table("goal", title="goals", title_justify="left")
        for heading in ("ratio", "goal", "met"):
            table.add_column(heading, justify="right")
        for goal in self.goals:
            ratio = "" if goal.ratio is None else f"{goal.ratio:.3g}"
            met = {True: "yes", False: "no", None: "not measured"}[goal.met]
            table.add_row(goal.text, ratio, f"{goal.must} {goal.bound:.3g}", met)
        return table


def machine() -> dict[str, str]:
    """What this runs on, and how busy it was."""
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
