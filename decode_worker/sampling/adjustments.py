"""Changes logits before a choice: penalties, bias, and tokens that must not come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from decode_worker.sampling.state import SampleState
from shared.errors import DrystoneError

# What adjusting makes of a logit stays within this: far beyond any model's, and divided by any temperature still
# a float32.
_LARGEST = 1e30

_Ids = npt.NDArray[np.int64]
_Values = npt.NDArray[np.float32]


def adjust(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SampleState]) -> dict[int, DrystoneError]:
    """Changes `logits[row]` in place as its state asks, for every row of `rows`.

    Repetition penalty (CTRL, arXiv 1909.05858, with the division turned round for negative logits, as
    transformers and vLLM have it), then frequency and presence penalty (as OpenAI defines them), then bias,
    then -inf for what must not come.

    Args:
        logits: float32 [batch, vocabulary].
        rows: Rows to change.
        states: The state of each of `rows`.

    Returns:
        By row, why a grammar could not say what may come.
    """
    pairs = list(zip(rows, states, strict=True))
    _repeat(logits, [(row, state) for row, state in pairs if state.repeats])
    _count(logits, [(row, state) for row, state in pairs if state.counts])
    _bias(logits, [(row, state) for row, state in pairs if len(state.bias[0])])
    _hold_back(logits, [(row, state) for row, state in pairs if state.held_back])
    return _constrain(logits, [(row, state) for row, state in pairs if state.position_in_grammar is not None])


_Pairs = list[tuple[int, SampleState]]


@dataclass(frozen=True, slots=True)
class _Places:
    """Single logits, and one number for each."""

    rows: torch.Tensor
    ids: torch.Tensor
    numbers: torch.Tensor


def _places(logits: torch.Tensor, wanted: Sequence[tuple[int, _Ids, _Values]]) -> _Places:
    rows = np.concatenate([np.full(len(ids), row) for row, ids, _ in wanted])
    ids = np.concatenate([ids for _, ids, _ in wanted])
    numbers = np.concatenate([values for _, _, values in wanted])
    known = ids < logits.shape[1]
    return _Places(
        *(torch.from_numpy(array[known]).to(logits.device) for array in (rows, ids, numbers)),
    )


def _change(
    logits: torch.Tensor, places: _Places, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    old = logits[places.rows, places.ids]
    new = change(old, places.numbers).clamp(-_LARGEST, _LARGEST)
    # What the model itself rules out stays out. A place that comes twice gets the same value twice.
    logits[places.rows, places.ids] = torch.where(old.isneginf(), old, new)


def _repeat(logits: torch.Tensor, pairs: _Pairs) -> None:
    if pairs:
        wanted = [
            (row, seen := state.seen, np.full(len(seen), state.params.repetition_penalty, dtype=np.float32))
            for row, state in pairs
        ]
        _change(logits, _places(logits, wanted), lambda old, by: torch.where(old > 0, old / by, old * by))


def _count(logits: torch.Tensor, pairs: _Pairs) -> None:
    if pairs:
        wanted = [(row, state.tally.ids, _for_counts(state)) for row, state in pairs]
        _change(logits, _places(logits, wanted), torch.sub)


def _for_counts(state: SampleState) -> _Values:
    taken = state.tally.counts.astype(np.float64) * state.params.frequency_penalty + state.params.presence_penalty
    return np.clip(taken, -_LARGEST, _LARGEST).astype(np.float32)


def _bias(logits: torch.Tensor, pairs: _Pairs) -> None:
    if pairs:
        _change(logits, _places(logits, [(row, *state.bias) for row, state in pairs]), torch.add)


def _hold_back(logits: torch.Tensor, pairs: _Pairs) -> None:
    if pairs:
        wanted = [
            (row, ids := np.fromiter(state.held_back, dtype=np.int64), np.zeros(len(ids), dtype=np.float32))
            for row, state in pairs
        ]
        places = _places(logits, wanted)
        logits[places.rows, places.ids] = -torch.inf


def _constrain(logits: torch.Tensor, pairs: _Pairs) -> dict[int, DrystoneError]:
    failed, masks = dict[int, DrystoneError](), dict[int, npt.NDArray[np.uint8]]()
    for row, state in pairs:
        if state.position_in_grammar is None:
            continue
        try:
            masks[row] = state.position_in_grammar.allowed()
        except DrystoneError as error:
            failed[row] = error
    if masks:
        bits = np.unpackbits(np.stack(list(masks.values())), axis=1, count=logits.shape[1], bitorder="little")
        banned = torch.from_numpy(bits == 0).to(logits.device)
        rows = torch.tensor(list(masks), device=logits.device)
        logits[rows] = logits[rows].masked_fill_(banned, -torch.inf)
    return failed
