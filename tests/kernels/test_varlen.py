"""The varlen backend: what it tells torch's kernel, with a double of it on a CPU, and with torch's own on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.attention import varlen_plan
from decode_worker.attention.varlen import VarlenAttention, torch_varlen
from decode_worker.attention.varlen_plan import PART_KEYS, VarlenPlan
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import RotationKind
from shared.kv.layout import KvShape
from tests.kernels.scenes import NONE, TOLERANCE, rotation
from tests.kernels.steps import Asked, Step
from tests.kernels.varlen_double import varlen_double

CPU = torch.device("cpu")
LENGTHS = [70, 1, 33]
ASKS: list[Asked] = [([0, 1, 2], 58, 9), ([2, 0], 100, 1), ([1, 2, 1], 3, 1), ([], 0, 66)]
LAYERS = [
    LayerGeometry(rotation(), None),
    LayerGeometry(rotation(), 50),
    LayerGeometry(NONE, None),
    LayerGeometry(rotation(RotationKind.INTERLEAVED, 8), 7),
]


def made(device: torch.device, dtype: str, asks: list[Asked] = ASKS, lengths: list[int] = LENGTHS) -> Step:
    return Step.make(device, lengths, asks, shape=KvShape(len(LAYERS), 2, 16, dtype), layers=LAYERS)


def test_a_step_of_the_worker() -> None:
    step = made(CPU, "float32")
    step.check(VarlenAttention(step.arena, step.layers, step.heads, varlen=varlen_double), 1e-5)


@settings(max_examples=6)
@given(
    lengths=st.tuples(st.integers(1, 90)).map(list),
    asks=st.lists(
        st.tuples(st.lists(st.just(0), max_size=2), st.sampled_from([0, 3, 63, 64, 130]), st.integers(1, 9)), max_size=2
    ).map(lambda asks: [*asks, ([0], 60, 5)]),
    part=st.sampled_from([16, PART_KEYS]),
)
def test_random_steps(*, lengths: list[int], asks: list[Asked], part: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen_plan, "PART_KEYS", part)
        step = made(CPU, "float32", asks, lengths)
        step.check(VarlenAttention(step.arena, step.layers, step.heads, varlen=varlen_double), 1e-5)


def test_one_call_a_layer_reads_every_piece_in_place() -> None:
    plan = VarlenPlan.of(made(CPU, "float32", ASKS[1:3]).plan, None, layers=3, group=2)
    assert plan.causal_rows == 0
    assert plan.dense.begins.shape == (3, len(plan.dense.keys) + 1)
    assert plan.dense.cum_rows[-1] == 2 * len(plan.rows)
    assert plan.turned == 5, "what block rows there are comes first"


def test_a_window_leaves_rows_the_keys_they_still_see() -> None:
    step = made(CPU, "float32", [([0], 10, 1)], [70])
    whole, cut, none = (VarlenPlan.of(step.plan, window, layers=1, group=1) for window in (None, 30, 5))
    assert whole.dense.keys.tolist() == [70, 10, 1]
    # The row is at 80; a window of 30 shows it 51..80: 19 keys of the block, and the tail.
    assert cut.dense.keys.tolist() == [19, 10, 1]
    assert int(cut.dense.begins[0, 0]) == int(whole.dense.begins[0, 0]) + 51
    assert none.dense.keys.tolist() == [4, 1]
    assert none.turned == 0


def test_long_blocks_are_read_in_parts() -> None:
    step = made(CPU, "float32", [([0], 0, 1)], [2 * PART_KEYS + 5])
    plan = VarlenPlan.of(step.plan, None, layers=1, group=1)
    assert sum(plan.dense.keys.tolist()) == 2 * PART_KEYS + 5 + 1
    assert plan.dense.most_keys <= PART_KEYS


def test_a_cpu_is_refused() -> None:
    step = made(CPU, "bfloat16")
    with pytest.raises(ValueError, match="needs CUDA, and the KV is on cpu"):
        VarlenAttention(step.arena, step.layers, step.heads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own kernel needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torchs_own_kernel(dtype: str) -> None:
    step = made(torch.device("cuda"), dtype)
    step.check(VarlenAttention(step.arena, step.layers, step.heads, varlen=torch_varlen), TOLERANCE[torch.bfloat16])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA can refuse a dtype")
def test_float32_is_refused_on_a_gpu() -> None:
    step = made(torch.device("cuda"), "float32")
    with pytest.raises(ValueError, match="takes bfloat16 and float16"):
        VarlenAttention(step.arena, step.layers, step.heads)
