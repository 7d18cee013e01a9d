"""Host side of the segment kernel: lays out a step, launches twice a layer, owns the workspace of partials.

    step     prepare(pieces, positions)                plan on the host, one copy to the device, angle tables
    layer    attend(step, layer, q, scale, window)     segment_partials, then merge_rows

    of a step
    tables   int32 [..]                       the sections of `triton_plan`
    angles   float32 [2, turns, rotary]       cosines and sines for each distinct rotation and offset
    workspace, rewritten by each layer of each step; grows when a step needs more, up to a limit
    outs     float32 [partials, heads, d]
    lses     float32 [partials, heads]

Angles are formed in float64 from the int32 offsets, once a step, and shared by all layers that turn
alike: float32 angles would round too much at long offsets.

For CUDA graphs: `reserve` the workspace, capture `attend` after `prepare(..., counts=padded,
tiling=fixed)`, and give that step to later calls of `prepare` as `into`: addresses, grids and kernels are
the same. `q` then has `counts.rows` rows, and those past the step's own come out as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch

from decode_worker.attention.triton_cut import Ints, Tiling, choose_tiling, padded_dim
from decode_worker.attention.triton_plan import Counts, Sections, plan_tables
from decode_worker.step import Piece
from shared.engine.rotation import Rotation, RotationKind

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MERGE_PARTIALS = 16


class TritonUnavailableError(RuntimeError):
    """The kernel cannot run here; says what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStep:
    """A step on the device, for as many layers as there are.

    Attributes:
        counts: Sizes of its tables, padded ones for a captured launch.
        tiling: How it was cut.
        tables: int32 [size].
        views: The sections of `tables` by name.
        angles: Cosines and sines, float32 [2, turns, rotary_dim], by identity of the rotation.
    """

    counts: Counts
    tiling: Tiling
    tables: torch.Tensor
    views: dict[str, torch.Tensor] = field(repr=False)
    angles: dict[int, torch.Tensor] = field(repr=False)


class TritonSegmentAttention:
    """Attention of a step's rows to their pieces. One thread and one stream use it.

    Args:
        records: The arena, [slots, 2 * kv_heads * head_dim]; on a GPU, or anywhere under the interpreter.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Elements of a head.
        rotations: What each layer applies; equal rotations share one object.
        most_partials: Limit of the workspace; a partial takes heads * (head_dim + 1) * 4 bytes.
        processors: Multiprocessors to balance over; None asks the device.
    """

    def __init__(
        self,
        records: torch.Tensor,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotations: Sequence[Rotation],
        most_partials: int,
        processors: int | None = None,
    ) -> None:
        if records.dtype not in DTYPES:
            raise ValueError(f"records are {records.dtype}; the kernel takes {sorted(map(str, DTYPES))}")
        if heads % kv_heads or records.shape[1:] != (2 * kv_heads * head_dim,):
            raise ValueError(f"{heads} heads, {kv_heads} KV heads of {head_dim} do not fit records {records.shape}")
        self._kernels = load_kernels(records.device)
        self._records = records
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._rotations = list(rotations)
        self._most_partials = most_partials
        device = records.device
        if processors is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._processors = processors
        self._float32_dot = records.dtype == torch.bfloat16 and self._kernels.INTERPRETED
        self.reserve(1)

    def reserve(self, partials: int) -> None:
        """Makes the workspace hold at least so many partials. What was captured with the old one is void."""
        self._outs = torch.empty(
            partials, self._heads, self._head_dim, dtype=torch.float32, device=self._records.device
        )
        self._lses = torch.empty(partials, self._heads, dtype=torch.float32, device=self._records.device)

    def tiling(self, most_rows: int) -> Tiling:
        """The tiling for steps whose pieces have up to `most_rows` rows."""
        group = self._heads // self._kv_heads
        return choose_tiling(group, self._head_dim, self._records.element_size(), most_rows, self._processors)

    def prepare(
        self,
        pieces: Sequence[Piece],
        positions: Sequence[int] | Ints,
        *,
        counts: Counts | None = None,
        tiling: Tiling | None = None,
        into: PreparedStep | None = None,
    ) -> PreparedStep:
        """Lays out a step for the layers to come.

        Args:
            pieces: Every run of keys and its rows. All keys are written before a layer attends. `causal` is not
                read: which keys a row sees follows from positions.
            positions: Global position of each query row.
            counts: Padded sizes of a captured launch; None for exactly this step's.
            tiling: Of a captured launch; None chooses by the longest piece in rows.
            into: A captured step, whose counts, tiling and memory are used.

        Raises:
            StepTooLargeError: More partials than the workspace may hold, or more than the captured launch holds.
        """
        if into is not None:
            counts, tiling = into.counts, into.tiling
        tiling = tiling or self.tiling(max((len(piece.rows) for piece in pieces), default=1))
        room = self._most_partials if counts is None else min(counts.partials, self._most_partials)
        plan = plan_tables(pieces, positions, tiling, heads=self._heads, kv_heads=self._kv_heads, partials=room)
        counts = counts or plan.counts
        if counts.partials > len(self._outs):
            self.reserve(min(1 << counts.partials.bit_length(), max(self._most_partials, counts.partials)))
        host = torch.empty(Sections.of(counts).size, dtype=torch.int32, pin_memory=self._records.is_cuda)
        plan.pack(counts, host.numpy())
        step = into or self._blank(counts, tiling)
        step.tables.copy_(host, non_blocking=True)
        deltas = step.views["deltas"][: counts.turns].to(torch.int64)
        for rotation in {id(rotation): rotation for rotation in self._rotations}.values():
            if rotation.kind is not RotationKind.NONE:
                for table, angles in zip(step.angles[id(rotation)], rotation.tables(deltas), strict=True):
                    table.copy_(angles)
        return step

    def attend(self, step: PreparedStep, layer: int, q: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """Attends in one layer to the pieces of a prepared step.

        Args:
            step: What `prepare` gave.
            layer: Layer of the model.
            q: [heads, rows, head_dim] after the model's RoPE, in the records' dtype; the last stride is 1.
            scale: Scale of the scores.
            window: Sliding window in tokens of global distance, or None.

        Returns:
            [rows, heads, head_dim], contiguous, in q's dtype.
        """
        rows = step.counts.rows
        if q.shape != (self._heads, rows, self._head_dim) or q.dtype != self._records.dtype or q.stride(2) != 1:
            raise ValueError(f"q is {q.dtype} {tuple(q.shape)} {q.stride()}; prepared for {rows} rows")
        if step.counts.items:
            self._launch_partials(step, layer, q, scale, window)
        return self._launch_merge(step, q.dtype)

    def _blank(self, counts: Counts, tiling: Tiling) -> PreparedStep:
        device = self._records.device
        tables = torch.empty(Sections.of(counts).size, dtype=torch.int32, device=device)
        rotaries = {id(rotation): rotation.rotary_dim for rotation in self._rotations}
        angles = {which: torch.empty(2, counts.turns, width, device=device) for which, width in rotaries.items()}
        return PreparedStep(counts, tiling, tables, _section_views(tables, counts), angles)

    def _launch_partials(
        self, step: PreparedStep, layer: int, q: torch.Tensor, scale: float, window: int | None
    ) -> None:
        views, tiling, rotation = step.views, step.tiling, self._rotations[layer]
        cosines, sines = step.angles[id(rotation)]
        self._kernels.segment_partials[(step.counts.items * self._kv_heads,)](
            self._records,
            q,
            cosines,
            sines,
            views["items"],
            views["runs"],
            views["rows"],
            views["turns"],
            views["limits"],
            views["reaches"],
            self._outs,
            self._lses,
            layer,
            window or 0,
            scale * math.log2(math.e),
            q.stride(0),
            q.stride(1),
            KV_HEADS=self._kv_heads,
            GROUP=self._heads // self._kv_heads,
            HEAD_DIM=self._head_dim,
            BLOCK_DIM=padded_dim(self._head_dim),
            ROTARY_DIM=rotation.rotary_dim,
            INTERLEAVED=rotation.kind is RotationKind.INTERLEAVED,
            WINDOWED=window is not None,
            FLOAT32_DOT=self._float32_dot,
            TILE_ROWS=tiling.tile_rows,
            TILE_KEYS=tiling.tile_keys,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )

    def _launch_merge(self, step: PreparedStep, dtype: torch.dtype) -> torch.Tensor:
        rows = step.counts.rows
        merged = torch.empty(rows, self._heads, self._head_dim, dtype=dtype, device=self._records.device)
        self._kernels.merge_rows[(rows, self._heads)](
            self._outs,
            self._lses,
            step.views["offsets"],
            step.views["members"],
            merged,
            HEADS=self._heads,
            HEAD_DIM=self._head_dim,
            BLOCK_DIM=padded_dim(self._head_dim),
            TILE_PARTIALS=_MERGE_PARTIALS,
            num_warps=4,
        )
        return merged


def load_kernels(device: torch.device) -> ModuleType:
    """The module of kernels; `TritonUnavailableError` without triton, or on a CPU without its interpreter."""
    try:
        from decode_worker.attention import triton_kernel
    except ImportError as error:
        raise TritonUnavailableError(
            f"the segment kernel needs triton >= 3.6, which torch's CUDA wheels bring: {error}"
        ) from error
    if device.type != "cuda" and not triton_kernel.INTERPRETED:
        raise TritonUnavailableError(
            f"records are on {device}: the segment kernel runs on a GPU, or under TRITON_INTERPRET=1 set before triton "
            "is imported"
        )
    return triton_kernel


def _section_views(tables: torch.Tensor, counts: Counts) -> dict[str, torch.Tensor]:
    starts = asdict(Sections.of(counts))
    ends = [*starts.values()][1:]
    return {name: tables[start:end] for (name, start), end in zip(starts.items(), ends, strict=False)}
