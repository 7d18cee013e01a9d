"""`make bench-transport`: shipping KV beside plain sockets and bare pyzmq, each figure against another of the same run.

    python -m tests.load.transport_figures --seconds-per-case 20 --json figures.json

1. Goodput from extent to committed extent, over loopback TCP and Unix-domain sockets; also without the checksum, and
   with CURVE.
2. A block of 1 MiB by itself, from the call to its return.
3. Four senders to four receivers at once, beside one pair alone.
4. Memory of a sender whose receiver stands still.

Every side is a process of its own. On a machine with few cores the processes of a pair share them, and more than one
pair shares them further: ratios count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.load import transport_cases as cases
from tests.load.figures_report import machine
from tests.load.goals import Goal
from tests.load.streams import Spread
from tests.load.transport_cases import BARE, OURS, PLAIN, Effort
from tests.load.transport_sides import WINDOW_BYTES, Transport

CASES: Final = ("goodput", "latency", "together", "stalled")
TRANSPORTS: Final[Sequence[Transport]] = ("tcp", "ipc")
# Above the credit: headers, transfers and tasks of what is queued, and what allocators keep.
SLACK_BYTES: Final = 16 << 20
Figures = dict[str, Spread]


def main() -> int:
    """Measures, prints figures and goals; 1 when a goal was missed."""
    options = _options()
    effort = Effort(options.seconds_per_case, options.rounds)
    about, figures, goals = machine(), Figures(), list[Goal]()
    with tempfile.TemporaryDirectory(prefix="drystone-bench-") as folder:
        for case in options.cases:
            for transport in options.transports if case != "stalled" else options.transports[:1]:
                _tell(f"{case}, {transport}")
                found, its_goals = measure(case, transport, Path(folder), effort)
                figures |= found
                goals += its_goals
    _print(about, figures, goals)
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(about, figures, goals), indent=1) + "\n", encoding="utf-8")
    return int(any(goal.met is False for goal in goals))


def measure(case: str, transport: Transport, folder: Path, effort: Effort) -> tuple[Figures, list[Goal]]:
    """Figures and goals of one case."""
    match case:
        case "goodput":
            return _goodput(transport, folder, effort)
        case "latency":
            return _latency(transport, folder, effort)
        case "together":
            return _together(transport, folder, effort)
        case _:
            return _stalled(transport, folder, effort)


def _goodput(transport: Transport, folder: Path, effort: Effort) -> tuple[Figures, list[Goal]]:
    rounds = cases.goodput(transport, folder, effort)
    rates = {way: Spread(tuple(one.sent.rate / 1e9 for one in some)) for way, some in rounds.items()}
    figures = {f"{transport}: goodput, {way}, GB/s": rate for way, rate in rates.items()}
    for way, some in rounds.items():
        for number, side in enumerate(("sender", "receiver")):
            busy = Spread(tuple(one.busy_per_gigabyte[number] * 1e3 for one in some))
            figures[f"{transport}: processor, {way}, {side}, ms a GB"] = busy
    return figures, [
        Goal(f"{transport}: goodput / {BARE}", _median_ratio(rates[OURS], rates[BARE]), 0.85, ">="),
        Goal(f"{transport}: goodput / {PLAIN}", _median_ratio(rates[OURS], rates[PLAIN]), 0.5, ">="),
    ]


def _latency(transport: Transport, folder: Path, effort: Effort) -> tuple[Figures, list[Goal]]:
    rounds = cases.latency(transport, folder, effort)
    taken = {way: Spread(tuple(one.sent.latency * 1e6 for one in some)) for way, some in rounds.items()}
    goal = Goal(f"{transport}: 1 MiB block / {PLAIN}", _median_ratio(taken[OURS], taken[PLAIN]), 3.0, "<=")
    return {f"{transport}: 1 MiB block, {way}, us": spread for way, spread in taken.items()}, [goal]


def _together(transport: Transport, folder: Path, effort: Effort) -> tuple[Figures, list[Goal]]:
    alone, at_once = cases.together(transport, folder, effort)
    rates = [cases.shared_rates(sents) for sents in at_once]
    one = Spread(tuple(sent.rate / 1e9 for sent in alone))
    whole = Spread(tuple(sum(each) / 1e9 for each in rates))
    fairness = Spread(tuple(min(each) / max(each) for each in rates))
    figures = {
        f"{transport}: one pair alone, GB/s": one,
        f"{transport}: four pairs at once, sum, GB/s": whole,
        f"{transport}: four pairs at once, slowest / fastest": fairness,
    }
    return figures, [
        Goal(f"{transport}: four pairs, sum / one pair", _median_ratio(whole, one), 0.8, ">="),
        Goal(f"{transport}: four pairs, slowest / fastest", fairness.median, 0.5, ">="),
    ]


def _stalled(transport: Transport, folder: Path, effort: Effort) -> tuple[Figures, list[Goal]]:
    found = cases.stalled(transport, folder, effort)
    figures = {
        f"{transport}: receiver stopped: queued, MiB": Spread((found.queued_bytes / 2**20,)),
        f"{transport}: receiver stopped: sender grew by, MiB": Spread((found.grown_bytes / 2**20,)),
        f"{transport}: receiver went on: sender grew by, MiB": Spread((found.grown_after_bytes / 2**20,)),
    }
    bound = WINDOW_BYTES + SLACK_BYTES
    text = f"{transport}: receiver stopped: growth / (credit + {SLACK_BYTES >> 20} MiB)"
    return figures, [Goal(text, found.grown_after_bytes / bound, 1.0, "<=")]


def _median_ratio(above: Spread, below: Spread) -> float:
    return above.median / below.median


def _print(about: Mapping[str, str], figures: Figures, goals: Sequence[Goal]) -> None:
    print("  ".join(f"{name}: {value}" for name, value in about.items()))
    for name, spread in figures.items():
        low, high = spread.quartiles
        print(f"{name:64} {spread.median:10.4g}  ({low:.4g}-{high:.4g}, {len(spread.values)} rounds)")
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'} {goal.text}: {goal.ratio:.3f} ({goal.must} {goal.bound:.3g})")


def _as_json(about: Mapping[str, str], figures: Figures, goals: Sequence[Goal]) -> dict[str, Any]:
    return {
        "machine": dict(about),
        "figures": {
            name: {"median": spread.median, "quartiles": spread.quartiles, "rounds": spread.values}
            for name, spread in figures.items()
        },
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds-per-case", type=float, default=20.0, help="of each case on each transport")
    parser.add_argument("--rounds", type=int, default=5, help="least rounds of a case, however long they take")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--transports", nargs="+", default=list(TRANSPORTS), choices=TRANSPORTS)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args()


def _tell(said: str) -> None:
    print(f"bench-transport: {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
