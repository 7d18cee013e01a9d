"""Goals: which side of a bound is met, and what happens to a figure that was not measured."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Literal

import pytest

from tests.load.bandwidth import Floor, kv_bytes_per_token, weight_bytes
from tests.load.goals import Goal, goals
from tests.load.streams import Spread

FLOOR = Floor(weight_bytes=900, kv_bytes_per_token=1, context_tokens=100, bytes_per_second=100_000)


@pytest.mark.parametrize(
    ("ratio", "must", "met"),
    [(6.0, ">=", True), (5.9, ">=", False), (6.0, "<=", True), (6.1, "<=", False), (6.0, "<", False), (5.9, "<", True)],
)
def test_bound(ratio: float, must: Literal[">=", "<=", "<"], met: object) -> None:
    assert Goal("", ratio, 6.0, must).met is met


def test_every_goal_is_there_though_nothing_was_measured() -> None:
    judged = goals({}, {}, FLOOR)
    assert len(judged) == 7
    assert {goal.met for goal in judged} == {None}


def test_ratios_are_of_medians() -> None:
    ours = {
        "ttft_shuffled": Spread((0.1, 0.1, 9.0)),
        "itl": Spread((0.02,)),
        "one_whole": Spread((10.0,)),
        "sixteen_whole": Spread((70.0,)),
    }
    vllm = {"ttft_shuffled": Spread((4.0,)), "ttft_again": Spread((0.2,)), "itl": Spread((0.04,))}
    shuffled, again, itl, share, *_, sixteen = goals(ours, vllm, FLOOR)
    assert shuffled.ratio == pytest.approx(1 / 40)
    assert again.ratio == pytest.approx(0.5)
    assert itl.ratio == pytest.approx(0.5)
    assert share.ratio == pytest.approx(0.01 / 0.02)
    assert not share.met
    assert sixteen.ratio == pytest.approx(7.0)
    assert sixteen.met


def test_bytes_of_a_step(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
            "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weight_bytes(tmp_path) == 12
    assert kv_bytes_per_token(tmp_path) == 2 * 30 * 3 * 64 * 2
