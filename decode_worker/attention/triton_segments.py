"""Host side of the segment kernel: owns its workspace, lays out a step, launches twice a layer.

    step     prepare(pieces, positions)      plan on the host, one copy to the device, angle tables
    layer    attend(layer, q, scale, window) segment_partials, then merge_rows

    workspace, made once
    tables  int32 [..]                       the sections of `triton_plan`, rewritten each step
    angles  float32 [stacked + 1, rotary]    cosines and sines for each distinct rotation and offset
    outs    float32 [partials, heads, d]     rewritten each layer
    lses    float32 [partials, heads]

Angles are formed in float64 from the int32 offsets, once a step, and shared by all layers that turn
alike: float32 angles would round too much at long offsets, and 64 sines a row are nothing.

For CUDA graphs: capture `attend` after `prepare(..., counts=padded, tiling=fixed)`. Later steps call
`prepare` with the same counts and tiling and replay; addresses, grids and kernels are the same. `q`
then has `counts.rows` rows, and those past the step's own come out as zeros. An item has at least one
partial, so counts with as many items as partials hold every step whose rows and stacked rows fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

import torch

from decode_worker.attention.triton_plan import Counts, Sections, SegmentPiece, StepTooLargeError, Tiling, plan_step
from shared.engine.rotation import Rotation, RotationKind

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MERGE_PARTIALS = 16
# Programs that a multiprocessor is given to balance over: two at a time in shared memory, two rounds.
_PROGRAMS_PER_PROCESSOR = 4
_HALF_BYTES = 2
# Fewest rows of a matrix product; the largest head of which 64 half-precision keys leave room for three programs.
_NARROW = 16
_SMALL_DIM = 128


class TritonUnavailableError(RuntimeError):
    """The kernel cannot run here; says what is missing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most of a step. A step fits exactly when its rows and stacked rows do; splits take what is left of partials.

    Attributes:
        rows: Query rows.
        stacked: Stacked rows: each query row once for each block and tail segment that it attends to.
        partials: Partials, at least `stacked`; each takes heads * (head_dim + 1) * 4 bytes.
    """

    rows: int
    stacked: int
    partials: int

    def __post_init__(self) -> None:
        if not 0 < self.rows <= self.stacked <= self.partials:
            raise ValueError(f"0 < rows <= stacked <= partials does not hold for {self}")

    @property
    def counts(self) -> Counts:
        """Largest tables: an item and a line of angles have at least one partial or stacked row of their own."""
        return Counts(self.rows, self.stacked, self.partials, self.partials, self.stacked + 1)


class TritonSegmentAttention:
    """Attention of a step's rows to their pieces. One thread and one stream use it.

    Args:
        records: The arena, [slots, 2 * kv_heads * head_dim]; on a GPU, or anywhere under the interpreter.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Elements of a head.
        rotations: What each layer applies; equal rotations share one object.
        limits: Sizes of the workspace.
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
        limits: Limits,
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
        self._limits = limits
        device = records.device
        if processors is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._processors = processors
        self._float32_dot = records.dtype == torch.bfloat16 and self._kernels.INTERPRETED
        self._tables = torch.zeros(Sections.of(limits.counts).size, dtype=torch.int32, device=device)
        self._outs = torch.empty(limits.partials, heads, head_dim, dtype=torch.float32, device=device)
        self._lses = torch.empty(limits.partials, heads, dtype=torch.float32, device=device)
        self._angles = {
            id(rotation): torch.zeros(2, limits.stacked + 1, rotation.rotary_dim, device=device)
            for rotation in self._rotations
        }
        self._counts = Counts(0, 0, 0, 0, 0)
        self._tiling = self.tiling(1)
        self._views = _section_views(self._tables, self._counts)

    def tiling(self, most_rows: int) -> Tiling:
        """The tiling for steps whose pieces have up to `most_rows` rows."""
        group = self._heads // self._kv_heads
        return choose_tiling(group, self._head_dim, self._records.element_size(), most_rows, self._processors)

    def prepare(
        self,
        pieces: Sequence[SegmentPiece],
        positions: Sequence[int],
        *,
        counts: Counts | None = None,
        tiling: Tiling | None = None,
    ) -> Counts:
        """Lays out a step for the layers to come.

        Args:
            pieces: Every run of keys and its rows. All keys are written before a layer attends.
            positions: Global position of each query row.
            counts: Padded sizes of a captured launch; None for exactly this step's.
            tiling: Of a captured launch; None chooses by the longest piece in rows.

        Returns:
            The step's own counts, for choosing padded ones.
        """
        tiling = tiling or self.tiling(max((len(piece.rows) for piece in pieces), default=1))
        room = self._limits.counts if counts is None else counts
        plan = plan_step(pieces, positions, tiling, heads=self._heads, kv_heads=self._kv_heads, partials=room.partials)
        counts = counts or plan.counts
        if not self._limits.counts.holds(counts):
            raise StepTooLargeError(f"step {counts} does not fit a workspace of {self._limits}")
        host = torch.empty(Sections.of(counts).size, dtype=torch.int32, pin_memory=self._tables.is_cuda)
        plan.pack(counts, host.numpy())
        self._tables[: len(host)].copy_(host, non_blocking=True)
        self._counts, self._tiling = counts, tiling
        self._views = _section_views(self._tables, counts)
        deltas = self._views["deltas"][: counts.turns].to(torch.int64)
        for rotation in {id(rotation): rotation for rotation in self._rotations}.values():
            if rotation.kind is not RotationKind.NONE:
                for table, angles in zip(self._angles[id(rotation)], rotation.tables(deltas), strict=True):
                    table[: counts.turns].copy_(angles)
        return plan.counts

    def attend(self, layer: int, q: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """Attends in one layer to the pieces of the prepared step.

        Args:
            layer: Layer of the model.
            q: [heads, rows, head_dim] after the model's RoPE, in the records' dtype; the last stride is 1.
            scale: Scale of the scores.
            window: Sliding window in tokens of global distance, or None.

        Returns:
            [rows, heads, head_dim], contiguous, in q's dtype.
        """
        rows = self._counts.rows
        if q.shape != (self._heads, rows, self._head_dim) or q.dtype != self._records.dtype or q.stride(2) != 1:
            raise ValueError(f"q is {q.dtype} {tuple(q.shape)} {q.stride()}; prepared for {rows} rows")
        if self._counts.items:
            self._launch_partials(layer, q, scale, window)
        return self._launch_merge(q.dtype)

    def _launch_partials(self, layer: int, q: torch.Tensor, scale: float, window: int | None) -> None:
        views, tiling, rotation = self._views, self._tiling, self._rotations[layer]
        cosines, sines = self._angles[id(rotation)]
        self._kernels.segment_partials[(self._counts.items * self._kv_heads,)](
            self._records,
            q,
            cosines,
            sines,
            views["items"],
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

    def _launch_merge(self, dtype: torch.dtype) -> torch.Tensor:
        rows = self._counts.rows
        merged = torch.empty(rows, self._heads, self._head_dim, dtype=dtype, device=self._records.device)
        self._kernels.merge_rows[(rows, self._heads)](
            self._outs,
            self._lses,
            self._views["offsets"],
            self._views["members"],
            merged,
            HEADS=self._heads,
            HEAD_DIM=self._head_dim,
            BLOCK_DIM=padded_dim(self._head_dim),
            TILE_PARTIALS=_MERGE_PARTIALS,
            num_warps=4,
        )
        return merged


def piece_of_view(kv: torch.Tensor, rows: Sequence[int], bases: Sequence[int], *, local: bool) -> SegmentPiece:
    """The piece of an arena view [layers, keys, 2, kv_heads, head_dim]."""
    record = kv.stride(1)
    return SegmentPiece(kv.storage_offset() // record, kv.stride(0) // record, kv.shape[1], rows, bases, local)


def choose_tiling(group: int, head_dim: int, item_bytes: int, most_rows: int, processors: int) -> Tiling:
    """Tiles for a model and a step: narrow for decoding, wide for question chunks.

    The largest that compile for sm_90 without spilling registers (`tests/kernels/test_triton_compile.py`).
    Narrow half-precision tiles of 64 keys leave room for three programs on a multiprocessor. Float32 is
    multiplied exactly and not by the matrix units, which takes more registers.
    """
    half, small = item_bytes == _HALF_BYTES, padded_dim(head_dim) <= _SMALL_DIM
    lines = min(64 if half else 32, _power_of_two(group * most_rows))
    lines = max(_NARROW, lines, _power_of_two(group))
    if half:
        keys, warps = (64, 4) if small else (32, 4 if lines <= 2 * _NARROW else 8)
    else:
        keys, warps = (32 if small and lines == _NARROW else 16, 8)
    return Tiling(lines, keys, _PROGRAMS_PER_PROCESSOR * processors, warps=warps)


def padded_dim(head_dim: int) -> int:
    """The next power of two, at least 16: what a tile's matrix product takes."""
    return max(16, _power_of_two(head_dim))


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


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
