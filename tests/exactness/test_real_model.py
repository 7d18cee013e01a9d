"""The default model on real questions; the whole of it is `make check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from drystone.local import gate
from drystone.local.gate_prompts import read_prompts
from drystone.local.options import GateOptions

HOTPOT = Path(__file__).resolve().parents[3] / "shared" / "data" / "hotpotqa-100.jsonl"


@pytest.mark.real_model
async def test_gate_passes_on_hotpotqa():
    if not HOTPOT.exists():
        pytest.skip("needs hotpotqa-100.jsonl in ../shared/data, which is not part of the product")
    from shared.model.catalog import resolve_model

    options = GateOptions(questions=HOTPOT, max_new_tokens=16, attention=("block", "full"))
    report = await gate.run(options, resolve_model("default", print), "default", read_prompts(HOTPOT, 2))
    assert report.passed, report


@pytest.mark.real_model
async def test_gate_passes_on_made_up_prompts_in_bfloat16():
    from shared.model.catalog import resolve_model

    options = GateOptions(dtypes=("bfloat16",))
    report = await gate.run(options, resolve_model("default", print), "default", read_prompts(None, 12))
    assert report.passed, report
