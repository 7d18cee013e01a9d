"""Log probabilities of the model's own distribution: before temperature, penalties, bias and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decode_worker.sampling.token_bytes import TokenBytes
from drystone.v1.sampling_pb2 import TokenLogprob, TopLogprob


def described(
    logprobs: torch.Tensor, token_ids: Sequence[int], alternatives: Sequence[int], token_bytes: TokenBytes
) -> list[TokenLogprob]:
    """What clients are told about the tokens chosen.

    Args:
        logprobs: Natural logarithms, float32 [rows, vocabulary].
        token_ids: The token chosen in each row.
        alternatives: How many of the most probable tokens to name in each row; of equal ones the lower id first.
        token_bytes: Of the model's tokenizer.
    """
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])[:, 0].tolist()
    return [
        TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            token=token_bytes[token_id],
            top=[
                TopLogprob(token_id=other, logprob=value, token=token_bytes[other])
                for other, value in _best(row, count)
            ],
        )
        for row, token_id, logprob, count in zip(logprobs, token_ids, chosen, alternatives, strict=True)
    ]


def _best(row: torch.Tensor, count: int) -> list[tuple[int, float]]:
    count = min(count, len(row))
    if not count:
        return []
    # Which of several equal ones topk names is not said; so take all that reach the least, in order of their ids.
    least = row.topk(count).values[-1]
    ids = (row >= least).nonzero()[:, 0]
    order = row[ids].sort(descending=True, stable=True).indices[:count]
    ids = ids[order]
    return list(zip(ids.tolist(), row[ids].tolist(), strict=True))
