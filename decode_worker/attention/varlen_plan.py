"""A step as sequences for torch's variable-length attention: rows in a row, keys anywhere.

packed rows      dense, pieces' order: blocks (turned) then tails     causal
dense            one sequence for each piece, or for what a window leaves of it to a row; long ones in parts
causal           one for each run of keys that a question's own rows see one by one
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from decode_worker.step import Piece, StepPlan

Ints = npt.NDArray[np.int64]
# Long blocks are read in parts, so that few requests fill the GPU too: torch splits no packed sequence by itself.
PART_KEYS = 512
# First record in layer 0, records from layer to layer, keys, rows.
Run = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """What one call attends to.

    Attributes:
        cum_rows: int32 [n + 1]: first row of each sequence, and the end.
        begins: int32 [layers, n + 1]: record where each begins; the last is not used.
        keys: int32 [n].
        most_rows: Rows of the longest.
        most_keys: Keys of the longest.
        causal: Row i of a sequence sees keys 0..i; each has as many rows as keys. Else rows see all keys.
    """

    cum_rows: torch.Tensor
    begins: torch.Tensor
    keys: torch.Tensor
    most_rows: int
    most_keys: int
    causal: bool

    @classmethod
    def of(cls, runs: Sequence[Run], *, layers: int, group: int, causal: bool) -> Sequences:
        """Sequences of runs, with `group` packed rows for each row."""
        first, stride, keys, rows = np.array(runs, np.int64).reshape(-1, 4).T
        begins = np.append(first + stride * np.arange(layers)[:, None], np.zeros((layers, 1), np.int64), axis=1)
        cum_rows = np.concatenate(([0], np.cumsum(rows * group)))
        return cls(
            cum_rows=torch.from_numpy(cum_rows.astype(np.int32)),
            begins=torch.from_numpy(begins.astype(np.int32)),
            keys=torch.from_numpy(keys.astype(np.int32)),
            most_rows=int(rows.max(initial=0)) * group,
            most_keys=int(keys.max(initial=0)),
            causal=causal,
        )

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        cum_rows, begins, keys = (t.to(device, non_blocking=True) for t in (self.cum_rows, self.begins, self.keys))
        return replace(self, cum_rows=cum_rows, begins=begins, keys=keys)


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPlan:
    """A step's sequences for layers with one window.

    Attributes:
        rows: int64 [stacked]: query row of each packed row.
        deltas: int64 [turned]: by how much the first packed rows are turned.
        dense: Sequences of the first packed rows.
        causal: Sequences of the last `causal_rows`.
        causal_rows: Packed rows of `causal`.
        table: int64 [query rows, most]: packed rows of each query row, padded with `stacked`.
    """

    rows: torch.Tensor
    deltas: torch.Tensor
    dense: Sequences
    causal: Sequences
    causal_rows: int
    table: torch.Tensor

    @property
    def turned(self) -> int:
        """Packed rows that are turned."""
        return len(self.deltas)

    @classmethod
    def of(cls, plan: StepPlan, window: int | None, *, layers: int, group: int) -> VarlenPlan:
        """Lays out a step; rows that a window hides from all of a piece's keys have no part in it."""
        reaches = (plan.positions[plan.rows] - plan.bases).numpy()
        dense: list[Run] = []
        causal: list[Run] = []
        taken: list[Ints] = []
        own: list[Ints] = []
        start = 0
        for piece in plan.pieces:
            lines = np.arange(start, start + len(piece.rows))
            start += len(lines)
            alone = piece.keys if piece.causal else 0
            if alone:
                causal.append((piece.first, piece.stride, piece.keys, alone))
                own.append(lines[:alone])
            for skipped, part in _by_window(reaches, lines[alone:], window):
                for run in _parts(piece, skipped, len(part)):
                    dense.append(run)
                    taken.append(part)
        packed = np.concatenate([*taken, *own])
        lines_of = torch.from_numpy(packed)
        turned = int((packed < plan.turned).sum())
        rows = plan.rows[lines_of]
        sequences = (
            Sequences.of(dense, layers=layers, group=group, causal=False),
            Sequences.of(causal, layers=layers, group=1, causal=True),
        )
        deltas = -plan.bases[lines_of[:turned]]
        return cls(rows, deltas, *sequences, sum(map(len, own)), _merge_table(rows.numpy(), len(plan.positions)))

    def to(self, device: torch.device) -> VarlenPlan:
        """The same on a device."""
        rows, deltas, table = (t.to(device, non_blocking=True) for t in (self.rows, self.deltas, self.table))
        return VarlenPlan(rows, deltas, self.dense.to(device), self.causal.to(device), self.causal_rows, table)


def _by_window(reaches: Ints, lines: Ints, window: int | None) -> Iterator[tuple[int, Ints]]:
    """Groups of stacked rows with the number of first keys that the window hides from them."""
    if not len(lines):
        return
    if window is None:
        yield 0, lines
        return
    hidden = np.maximum(reaches[lines] - window + 1, 0)
    for skipped in np.unique(hidden):
        yield int(skipped), lines[hidden == skipped]


def _parts(piece: Piece, skipped: int, rows: int) -> Iterator[Run]:
    keys = piece.keys - skipped
    parts = -(-keys // PART_KEYS)
    for part in range(parts):
        begin, end = keys * part // parts, keys * (part + 1) // parts
        yield piece.first + skipped + begin, piece.stride, end - begin, rows


def _merge_table(rows: Ints, count: int) -> torch.Tensor:
    """int64 [count, most]: the packed rows of each query row, padded with the number of all packed rows."""
    order = np.argsort(rows, kind="stable")
    uses = np.bincount(rows, minlength=count)
    firsts = np.cumsum(uses) - uses
    table = np.full((count, int(uses.max())), len(rows), np.int64)
    table[rows[order], np.arange(len(rows)) - firsts[rows[order]]] = order
    return torch.from_numpy(table)
