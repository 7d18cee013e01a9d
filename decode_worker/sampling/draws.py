"""Counter-based randomness: a draw depends on (seed, sample index, position in the answer) alone (design §6).

Another worker, or another batch, draws the same number at the same place.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch

from decode_worker.sampling.filters import filtered
from decode_worker.sampling.state import SampleState


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same on every machine for the same arguments."""
    counter = struct.pack("<QIQ", seed, sample_index, position)
    bits = int.from_bytes(hashlib.blake2b(counter, digest_size=8, person=b"drystone-draw").digest(), "little")
    return (bits >> 11) * 2.0**-53


def draw(logits: torch.Tensor, states: Sequence[SampleState]) -> list[int]:
    """A token for each row: temperature, filters, then the inverse of the cumulative distribution at one draw.

    Args:
        logits: float32 [rows, vocabulary]; each row has one that is finite, none is nan or inf.
        states: One for each row, none of them greedy.
    """
    device = logits.device
    temperature = torch.tensor([state.params.temperature for state in states], dtype=torch.float32, device=device)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    kept = filtered(probabilities, [state.params for state in states])
    cumulative = kept.to(torch.float64).cumsum(dim=-1)
    numbers = [uniform(state.params.seed, state.sample_index, len(state.generated)) for state in states]
    whole = cumulative[:, -1:].contiguous()
    at = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * whole
    # The first token whose mass goes beyond the draw. A draw rounded up to the whole mass takes the last kept one.
    found = torch.searchsorted(cumulative, at, right=True)
    return torch.minimum(found, torch.searchsorted(cumulative, whole))[:, 0].tolist()
