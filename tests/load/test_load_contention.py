"""CPU time of ours and of others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.load.contention import CpuTimes, _tree


def test_others_are_what_is_not_ours() -> None:
    before, after = CpuTimes(at=10.0, machine=100.0, ours=40.0), CpuTimes(at=14.0, machine=107.0, ours=43.0)
    assert after.others_since(before) == pytest.approx(1.0)


def test_counters_that_round_apart_are_no_negative_time() -> None:
    assert CpuTimes(12.0, 100.0, 40.02).others_since(CpuTimes(10.0, 100.0, 40.0)) == 0.0


def test_a_tree_is_every_descendant() -> None:
    assert _tree(2, {1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 6: 4}) == {2, 3, 4, 6}


def test_a_childs_time_is_ours() -> None:
    # It burns CPU time by its own clock, then says so and waits: no time passes unseen.
    burn = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nsys.stdin.read()"
    before = CpuTimes.now()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = CpuTimes.now()
        child.communicate()
    assert after.ours - before.ours >= 0.25
