"""Drystone beside other servers: first token, time between tokens, and throughput, as ratios in one run.

    python -m tests.load.engine_figures --peers vllm [--rounds 3] [--json FILE]

Everything that computes tokens takes turns on one core with one thread; the client, gateways and the prefill worker
are on another. In each round every scenario runs on one system after the other, with the same prompts. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

from rich.console import Console

from drystone import AsyncClient, DrystoneError
from drystone.local.supervisor import SupervisorError
from shared.model import ModelError, catalog
from tests.load.bandwidth import Floor, kv_bytes_per_token, read_rate_of, weight_bytes
from tests.load.bf16_model import bf16_folder
from tests.load.contention import CpuTimes
from tests.load.drystone_server import DrystoneServer
from tests.load.figures_report import Report, SystemFigures, machine
from tests.load.goals import goals
from tests.load.peers.folders import peers_dir
from tests.load.peers.peer import Cores
from tests.load.peers.registry import PEERS, peer
from tests.load.peers.server import PeerError
from tests.load.scenarios import TOKENS, Measured, Round
from tests.load.streams import Spread
from tests.load.systems import DrystoneSystem, MeasureError, PeerSystem, System, alone
from tests.load.workload import Prompt, Workload

SCENARIOS: Final = ("single", "eight", "sixteen")
QUESTIONS: Final = Path("../shared/data/hotpotqa-100.jsonl")
_WARM_UP_SET: Final = -1


@dataclass(slots=True)
class Contender:
    """A running system with what is known of it so far.

    Args:
        system: The system.
        version: Its version.
        setting: What it runs with.
        budget: Seconds that it may be measured for; a scenario in hand is finished.
    """

    system: System
    version: str
    setting: str
    budget: float
    measured: Measured = field(default_factory=Measured)
    note: str = ""
    failed: bool = False

    async def run(self, one: Round, name: str, tell: Console) -> None:
        """Runs one scenario, unless the system failed before or its time is used up."""
        if self.failed or self.budget <= 0:
            self.note = self.note or f"its --budget was used up before {name} of round {one.number + 1}"
            return
        began, before = time.monotonic(), CpuTimes.now()
        with self._watched(f"{name} of round {one.number + 1}"):
            async with alone(self.system) as system:
                async for part in one.scenarios[name](system, self.measured):
                    took = time.monotonic() - began
                    tell.print(f"round {one.number + 1}: {self.system.name}: {name}: {part} ({took:.1f} s)")
        self.measured.add("others", CpuTimes.now().others_since(before))
        self.budget -= time.monotonic() - began

    async def warm_up(self, prompt: Prompt) -> None:
        """Asks once without measuring: whatever a server does on its first request is done then."""
        with self._watched("its first request"):
            async with alone(self.system) as system:
                await system.ask(prompt, TOKENS)

    @contextlib.contextmanager
    def _watched(self, where: str) -> Iterator[None]:
        """A failure ends this system's part and no other's."""
        try:
            yield
        except* (MeasureError, DrystoneError, OSError) as errors:
            self.failed = True
            self.note = f"failed in {where}: {errors.exceptions[0]}"

    def figures(self) -> SystemFigures:
        """What was measured."""
        spreads = {name: Spread(tuple(values)) for name, values in self.measured.figures.items()}
        return SystemFigures(self.version, self.setting, spreads, self.note)


async def measure(options: argparse.Namespace, tell: Console) -> Report:
    """Starts everything, measures in rounds, stops everything.

    Raises:
        ModelError: The model cannot be had.
        SupervisorError: Drystone did not start.
        ValueError: The questions cannot be used.
    """
    cores = Cores(options.core, options.helper_core)
    os.sched_setaffinity(0, {cores.helper})
    found = machine()
    model = bf16_folder(catalog.resolve_model(options.model, tell.print), tell.print)
    workload = Workload(options.questions, model)
    skipped: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        # taskset is told each process's core; what this one has is no limit for them.
        server = DrystoneServer(model, options.threads, cores, peers_dir() / "drystone.log")
        tell.print("starting drystone")
        await asyncio.to_thread(stack.enter_context, server)
        client = await stack.enter_async_context(AsyncClient(server.address))
        setting = "bf16, 1 prefill and 1 decode worker"
        contenders = [Contender(DrystoneSystem(client), version("drystone-server"), setting, options.budget)]
        for name in options.peers:
            chosen = peer(name)
            if reason := chosen.missing():
                skipped[name] = reason
                continue
            tell.print(f"starting {name}")
            try:
                process = await asyncio.to_thread(chosen.start, model, options.threads, cores)
            except PeerError as error:
                skipped[name] = str(error)
                continue
            stack.callback(process.stop)
            contender = Contender(PeerSystem(chosen, process), chosen.version, chosen.setting, options.budget)
            contenders.append(contender)
            process.pause()
        bandwidth = await asyncio.to_thread(read_rate_of, cores.engine)
        for contender in contenders:
            await contender.warm_up(workload.prompt(_WARM_UP_SET, 0, 0))
        await _rounds(options, workload, contenders, tell)
    ours, *_ = (contender.figures() for contender in contenders)
    systems = {contender.system.name: contender.figures() for contender in contenders}
    prompt = ours.figures.get("prompt_tokens")
    context = (prompt.median if prompt else 0) + TOKENS / 2
    floor = Floor(weight_bytes(model), kv_bytes_per_token(model), context, bandwidth)
    vllm = systems.get("vllm")
    return Report(found, systems, skipped, floor, goals(ours.figures, vllm.figures if vllm else {}, floor))


async def _rounds(
    options: argparse.Namespace, workload: Workload, contenders: Sequence[Contender], tell: Console
) -> None:
    """Every scenario of every round on every system; who goes first changes from round to round."""
    for number in range(options.rounds):
        one = Round(workload, number, options.sets)
        turn = number % len(contenders)
        for name in options.scenarios:
            for contender in (*contenders[turn:], *contenders[:turn]):
                await contender.run(one, name, tell)


def main() -> int:
    """Exit code 1: something could not be measured."""
    options = _options()
    # A run that is told to end stops its servers, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tell = Console(stderr=True, highlight=False, markup=False)
    try:
        report = asyncio.run(measure(options, tell))
    except (ModelError, SupervisorError, MeasureError, ValueError, OSError) as error:
        tell.print(f"engine_figures: {error}")
        return 1
    except KeyboardInterrupt:
        tell.print("engine_figures: stopped; nothing is left running")
        return 130
    report.print(Console(width=160))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return 1 if any(system.note.startswith("failed") for system in report.systems.values()) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="vllm", help=f"peers to run beside: {', '.join(PEERS)} (vllm)")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="scenarios (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--sets", type=int, default=2, help="fresh sets of passages asked singly in each round (2)")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds that one system is measured for (900)")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help=f"JSON Lines of questions ({QUESTIONS})")
    parser.add_argument("--model", default="default", help="model folder, or 'default'")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine (1)")
    parser.add_argument("--core", type=int, default=0, help="core of the engine in turn (0)")
    parser.add_argument("--helper-core", type=int, default=1, help="core of client, gateways and prefill worker (1)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    options.peers = options.peers.replace(",", " ").split()
    options.scenarios = options.scenarios.replace(",", " ").split()
    for kind, names, known in (("peer", options.peers, PEERS), ("scenario", options.scenarios, SCENARIOS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    if not options.questions.is_file():
        parser.error(f"no file {options.questions}; --questions takes JSON Lines of question and documents")
    return options


if __name__ == "__main__":
    sys.exit(main())
