"""Segment attention on CUDA by torch's own variable-length flash attention; keys and values are read in place.

torch packs sequences end to end and takes the place where each begins (`cum_seq_k`). Given the keys that
each uses as well (`seqused_k`), the kernel takes a sequence's length from there and of `cum_seq_k` only
where it begins, so sequences may lie anywhere in one tensor, in any order (`BlockInfo` of FlashAttention 2).
The whole arena is that tensor, and no KV is gathered:

    records       ..│ X ...│...│ tail B │...│ Y .......│ tail A │..       [slots, kv_heads, d], strided
    cum_seq_k     X, Y, tail A, tail B, 0                                 where layer l of each begins
    seqused_k     keys of each

torch documents neither half of that, so it is **proved when the backend is made**, on a few keys.

The query heads of a KV head are packed as rows of it, so that its keys are read once for all; that holds
for sequences whose rows see all of their keys. The few keys that a question's own rows see causally go in a
second call, with heads as they are. A sliding window cuts a piece per row: what is left is again a
sequence, of fewer keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from decode_worker.arena import Arena
from decode_worker.attention.base import OwnKv
from decode_worker.attention.varlen_plan import Sequences, VarlenPlan
from decode_worker.step import StepPlan
from shared.engine.partials import merge_partials
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import Rotation
from shared.engine.seam import AttentionContext

_HALVES = (torch.bfloat16, torch.float16)
_MOST_DIM = 256
# Far above what half precision rounds, far below what other keys would give.
_PROOF = 2e-2
# (q [rows, heads, d], k and v [slots, kv_heads, d], sequences on the device, layer, scale, causal, window)
# to out [rows, heads, d] and log-sum-exp float32 [heads, rows].
Varlen = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequences, int, float, int | None], tuple[torch.Tensor, torch.Tensor]
]


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    layer: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's kernel, by the operator under `torch.nn.attention.varlen`, which takes `seqused_k` in every torch here.

    Args:
        q: [rows, heads, d].
        k: [slots, kv_heads, d], any row stride.
        v: As `k`.
        sequences: Where they are.
        layer: Layer of the model.
        scale: Factor of the scores.
        window: Sliding window of causal sequences, or None.

    Returns:
        out [rows, heads, d] in q's dtype, and the natural log-sum-exp, float32 [heads, rows].
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - the public form of some versions lacks seqused_k
        q,
        k,
        v,
        sequences.cum_rows,
        sequences.begins[layer],
        sequences.most_rows,
        sequences.most_keys,
        0.0,
        sequences.causal,
        return_debug_mask=False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0 if sequences.causal else -1,
        seqused_k=sequences.keys,
    )
    return out, lse


class VarlenAttention:
    """The backend that needs torch alone.

    Args:
        arena: Memory of all KV.
        layers: Rotation and window of each layer.
        heads: Query heads.
        varlen: Attends to sequences; another than torch's is for tests.

    Raises:
        ValueError: The arena is not on CUDA, its dtype or head size is not taken, or torch fails the proof.
    """

    name = "varlen"

    def __init__(
        self, arena: Arena, layers: Sequence[LayerGeometry], heads: int, *, varlen: Varlen = torch_varlen
    ) -> None:
        if varlen is torch_varlen:
            _refuse(arena)
            _prove(arena.records.device, arena.records.dtype, arena.shape.head_dim)
        self._arena = arena
        self._layers = layers
        self._heads = heads
        self._varlen = varlen

    def begin(self, plan: StepPlan) -> AttentionContext:
        """A step by this backend."""
        return VarlenStep(self._arena, self._layers, self._heads, self._varlen, plan)


class VarlenStep:
    """One step: an attention context. Layers with equal windows share one plan."""

    def __init__(
        self, arena: Arena, layers: Sequence[LayerGeometry], heads: int, varlen: Varlen, plan: StepPlan
    ) -> None:
        self._own = OwnKv(arena.records, plan, len(layers))
        self._keys, self._values = arena.records.view(len(arena.records), 2, arena.shape.kv_heads, -1).unbind(1)
        self._group = heads // arena.shape.kv_heads
        self._layers = layers
        self._varlen = varlen
        self._plan = plan
        self._plans: dict[int | None, VarlenPlan] = {}
        # Layers with equal rotations share one Rotation object (probe), hence identity in the key.
        self._angles: dict[tuple[int, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Writes the rows' own KV into their tails, then attends to blocks and tails."""
        self._own.write(layer, k, v)
        plan = self._plan_of(window)
        queries = self._turned(layer, q[0].transpose(0, 1)[plan.rows], plan, window)
        stacked, heads, width = queries.shape
        dense = len(plan.rows) - plan.causal_rows
        outs = torch.zeros(heads, stacked + 1, width, dtype=torch.float32, device=q.device)
        lses = torch.full((heads, stacked + 1), float("-inf"), device=q.device)
        if dense:
            by_group = (dense, heads // self._group, self._group, width)
            packed = queries[:dense].view(by_group).transpose(1, 2).flatten(0, 1)
            out, lse = self._varlen(packed, self._keys, self._values, plan.dense, layer, scale, None)
            out, lse = out.view(dense, self._group, -1, width), lse.view(-1, dense, self._group)
            outs[:, :dense] = out.permute(2, 1, 0, 3).flatten(0, 1)
            lses[:, :dense] = lse.transpose(1, 2).flatten(0, 1)
        if plan.causal_rows:
            out, lse = self._varlen(queries[dense:], self._keys, self._values, plan.causal, layer, scale, window)
            outs[:, dense:stacked], lses[:, dense:stacked] = out.transpose(0, 1), lse
        return merge_partials(outs, lses, plan.table).transpose(0, 1)[None].to(q.dtype)

    def _plan_of(self, window: int | None) -> VarlenPlan:
        if window not in self._plans:
            plan = VarlenPlan.of(self._plan, window, layers=len(self._layers), group=self._group)
            self._plans[window] = plan.to(self._keys.device)
        return self._plans[window]

    def _turned(self, layer: int, queries: torch.Tensor, plan: VarlenPlan, window: int | None) -> torch.Tensor:
        rotation = self._layers[layer].rotation
        if plan.turned and rotation.rotary_dim:
            cos, sin = self._angles_of(rotation, plan, window)
            turned = queries[: plan.turned]
            turned.copy_(rotation.apply(turned, cos[:, None], sin[:, None]))
        return queries

    def _angles_of(self, rotation: Rotation, plan: VarlenPlan, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        key = (id(rotation), window)
        if key not in self._angles:
            self._angles[key] = rotation.tables(plan.deltas)
        return self._angles[key]


def _refuse(arena: Arena) -> None:
    records, head_dim = arena.records, arena.shape.head_dim
    if not records.is_cuda:
        raise ValueError(f"attention: 'varlen' needs CUDA, and the KV is on {records.device}")
    if records.dtype not in _HALVES:
        raise ValueError(f"attention: 'varlen' takes bfloat16 and float16, and the KV is {records.dtype}")
    if head_dim % 8 or head_dim > _MOST_DIM:
        raise ValueError(f"attention: 'varlen' takes heads of 8, 16, .. {_MOST_DIM}, and the model's are {head_dim}")


def _prove(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Two runs of keys, out of order and apart, in one strided tensor: a torch that mixes them up is refused."""
    generator = torch.Generator(device).manual_seed(0)
    kv = torch.randn(200, 2, 1, head_dim, generator=generator, device=device).to(dtype)
    q = torch.randn(3, 1, head_dim, generator=generator, device=device).to(dtype)
    runs = Sequences.of([(130, 0, 70, 2), (10, 0, 33, 1)], layers=1, group=1, causal=False).to(device)
    scale = head_dim**-0.5
    try:
        out, lse = torch_varlen(q, kv[:, 0], kv[:, 1], runs, 0, scale, None)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"attention: 'varlen' does not run in torch {torch.__version__}: {error}") from error
    keys, values = kv.float()[:, :, 0].unbind(1)
    for row, (first, count) in enumerate(((130, 70), (130, 70), (10, 33))):
        scores = keys[first : first + count] @ q[row, 0].float() * scale
        expected = scores.softmax(0) @ values[first : first + count]
        error_out = (out[row, 0].float() - expected).norm() / expected.norm()
        error_lse = (lse[0, row] - scores.logsumexp(0)).abs()
        if not bool((error_out < _PROOF) & (error_lse < _PROOF)):
            raise ValueError(
                f"attention: 'varlen' of torch {torch.__version__} does not read keys where it is told to "
                f"(relative error {float(error_out):.1e})"
            )
