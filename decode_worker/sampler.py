"""Choosing a token from logits, with counter-based randomness.

A draw depends on (seed, sample index, position in the answer) alone, so another worker or another
batch draws the same number at the same place (design §6).
"""

from __future__ import annotations

import hashlib
import struct

import torch

from drystone.v1.sampling_pb2 import SamplingParams

# Below this temperature logits divided by it leave float32, and the largest takes everything anyway.
GREEDY_BELOW = 1e-5


def choose(logits: torch.Tensor, sampling: SamplingParams, *, position: int, sample_index: int = 0) -> int:
    """The next token.

    Args:
        logits: float32 [vocab], already free of forbidden tokens.
        sampling: Every default filled in.
        position: Tokens already generated.
        sample_index: Index of the sample.

    Returns:
        A token id. Greedy for a temperature below 1e-5 or top_k 1; else temperature, then min_p, top_k and top_p
        in vLLM's order, then the inverse of the cumulative distribution at one uniform draw.
    """
    if is_greedy(sampling):
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.min_p > 0:
        keep &= probabilities >= sampling.min_p * probabilities[0]
    if 0 < sampling.top_k < len(probabilities):
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        # Of what is left so far. The token that crosses top_p is kept, so at least one always is.
        left = probabilities * keep
        before = left.cumsum(0) - left
        keep &= before < sampling.top_p * left.sum()
    keep[0] = True  # whatever underflows, the most probable token stays
    kept = probabilities[keep].to(torch.float64)
    cumulative = kept.cumsum(0)
    draw = uniform(sampling.seed, sample_index, position) * float(cumulative[-1])
    chosen = min(int(torch.searchsorted(cumulative, draw, right=True)), len(kept) - 1)
    return int(order[keep][chosen])


def is_greedy(sampling: SamplingParams) -> bool:
    """True when no draw is made."""
    return sampling.temperature < GREEDY_BELOW or sampling.top_k == 1


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same on every machine for the same arguments."""
    counter = struct.pack("<QIQ", seed, sample_index, position)
    bits = int.from_bytes(hashlib.blake2b(counter, digest_size=8, person=b"drystone-draw").digest(), "little")
    return (bits >> 11) * 2.0**-53
