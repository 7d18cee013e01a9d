"""Bare rotations: they compose, undo themselves, keep lengths, and are the ones that transformers applies."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from shared.engine.rotation import Rotation, RotationKind

HEAD_DIM = 16
FULL = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
TURNING = [kind for kind in RotationKind if kind is not RotationKind.NONE]
KINDS = st.sampled_from([Rotation(kind, FULL[:pairs]) for kind in TURNING for pairs in (8, 3)])
DELTAS = st.lists(st.integers(-4000, 4000), min_size=1, max_size=6).map(torch.tensor)


def turned(rotation: Rotation, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return rotation.apply(x, *rotation.tables(by))


def queries(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, rows, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(rotation=KINDS, first=DELTAS, seed=st.integers(0, 99))
def test_rotations_compose_and_undo(rotation: Rotation, first: torch.Tensor, seed: int) -> None:
    x, second = queries(len(first), seed), first.flip(0) * 3 + 1
    torch.testing.assert_close(
        turned(rotation, turned(rotation, x, first), second), turned(rotation, x, first + second), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(turned(rotation, turned(rotation, x, first), -first), x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned(rotation, x, first).norm(dim=-1), x.norm(dim=-1))
    rest = rotation.rotary_dim
    assert torch.equal(turned(rotation, x, first)[..., rest:], x[..., rest:])


@settings(max_examples=40)
@given(rotation=KINDS, positions=DELTAS, offset=st.integers(0, 5000))
def test_scores_depend_on_distance_alone(rotation: Rotation, positions: torch.Tensor, offset: int) -> None:
    """⟨R(p)q, R(o+j)k⟩ = ⟨R(p-o)q, R(j)k⟩: what lets a block lie anywhere."""
    q, k = queries(len(positions), 1), queries(len(positions), 2)
    local = torch.arange(len(positions))
    moved = turned(rotation, q, positions + offset) @ turned(rotation, k, local + offset).transpose(1, 2)
    here = turned(rotation, q, positions) @ turned(rotation, k, local).transpose(1, 2)
    torch.testing.assert_close(moved, here, atol=2e-4, rtol=1e-3)


def test_half_is_what_llama_does() -> None:
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=HEAD_DIM))
    positions = torch.tensor([0, 1, 7, 500, 4000])
    x = queries(len(positions))[None]
    cos, sin = embedding(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    rotation = Rotation(RotationKind.HALF, embedding.inv_freq)
    torch.testing.assert_close(turned(rotation, x[0], positions), expected[0], atol=1e-4, rtol=1e-4)


def test_interleaved_turns_neighbours() -> None:
    rotation = Rotation(RotationKind.INTERLEAVED, torch.tensor([0.5, 0.25]))
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0, 9.0]])
    by = torch.tensor([2])
    expected = [[0.5403, 0.8415, -0.4794, 0.8776, 9.0]]
    torch.testing.assert_close(turned(rotation, x, by), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_kinds_are_told_apart_by_digest() -> None:
    rotations = [Rotation(kind, FULL) for kind in RotationKind] + [Rotation(RotationKind.HALF, FULL * 1.001)]
    assert len({rotation.digest() for rotation in rotations}) == len(rotations)
    assert Rotation(RotationKind.HALF, FULL.clone()).digest() == Rotation(RotationKind.HALF, FULL).digest()


def test_none_leaves_everything() -> None:
    rotation = Rotation(RotationKind.NONE, torch.zeros(0))
    assert rotation.rotary_dim == 0
    assert torch.equal(turned(rotation, queries(2), torch.tensor([5, 6])), queries(2))


@pytest.mark.parametrize("kind", TURNING)
def test_far_positions_keep_their_precision(kind: RotationKind) -> None:
    """Angles are made in float64: float32 ones are off by whole hundredths here."""
    rotation, far = Rotation(kind, torch.tensor([1.0])), torch.tensor([1_000_003])
    x = torch.tensor([[1.0, 0.0]])
    assert float(turned(rotation, x, far)[0, 0]) == pytest.approx(float(torch.cos(far.double())), abs=1e-6)
