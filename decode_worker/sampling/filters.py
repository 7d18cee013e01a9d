"""Which tokens of a distribution may be drawn: min_p, top_k, top_p."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drystone.v1.sampling_pb2 import SamplingParams

# How many of the largest are looked at before a row is sorted whole, which costs far more than finding some. Fixed, so
# that a row's outcome does not depend on the rows beside it.
_RANKS = (256, 4096)


def filtered(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution with 0 for every token that the filters take out; not renormalised.

    vLLM's order: min_p, then top_k, then top_p, each over what the one before left. Every filter keeps a
    beginning of the tokens in descending order, of equal ones the lower id first, so together they keep as
    many as the strictest does. One token always stays.

    Args:
        probabilities: float32 [rows, vocabulary], each row a distribution.
        params: One for each row.

    Returns:
        float32 [rows, vocabulary].
    """
    vocabulary = probabilities.shape[1]
    device = probabilities.device
    min_p = torch.tensor([each.min_p for each in params], dtype=torch.float32, device=device)
    if any(each.min_p > 0 for each in params):
        least = min_p[:, None] * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    by_rank = [row for row, each in enumerate(params) if 0 < each.top_k < vocabulary or each.top_p < 1]
    if not by_rank:
        return probabilities
    chosen = _by_rank(probabilities[by_rank], [params[row] for row in by_rank])
    if len(by_rank) == len(params):
        return chosen
    probabilities = probabilities.clone()
    probabilities[by_rank] = chosen
    return probabilities


def _by_rank(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    vocabulary = probabilities.shape[1]
    found = torch.zeros((len(params), 2), dtype=torch.float64, device=probabilities.device)
    open_rows = list(range(len(params)))
    for ranks in (*_RANKS, vocabulary):
        ranked = probabilities[open_rows].topk(min(ranks, vocabulary), dim=-1).values
        found[open_rows], settled = _least(ranked, vocabulary, [params[row] for row in open_rows])
        open_rows = [row for row, done in zip(open_rows, settled, strict=True) if not done]
        if not open_rows:
            break
    return _first(probabilities, *found.unbind(dim=1))


def _least(ranked: torch.Tensor, vocabulary: int, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, list[bool]]:
    """How far down each row goes.

    Args:
        ranked: The largest probabilities in descending order, float32 [rows, ranks].
        vocabulary: How many there are in all.
        params: One for each row.

    Returns:
        float64 [rows, 2]: how many tokens are kept, and the probability of the last of them; and for each row
        whether that is known from these ranks.
    """
    ranks, device = ranked.shape[1], ranked.device
    mass = ranked.to(torch.float64).cumsum(dim=-1)
    end_seen = (ranked[:, -1] == 0) | (ranks == vocabulary)
    left = torch.where(end_seen, (ranked > 0).sum(dim=-1), vocabulary)
    top_k = torch.tensor([each.top_k or vocabulary for each in params], device=device)
    within = torch.minimum(top_k, left)
    # What min_p and top_k leave is these ranks or a part of them; or all there is, whose mass is 1.
    known = within <= ranks
    total = torch.where(known, mass.gather(1, within.clamp(max=ranks)[:, None] - 1)[:, 0], 1.0)
    untouched = torch.tensor([each.min_p == 0 and not 0 < each.top_k < vocabulary for each in params], device=device)
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    # The token that crosses top_p is kept.
    reaching = (before < (top_p * total)[:, None]).sum(dim=-1).clamp(min=1)
    count = torch.minimum(torch.where(top_p < 1, reaching, vocabulary), within)
    settled = known | (untouched & (mass[:, -1] >= top_p * total))
    least = ranked.gather(1, count.clamp(max=ranks)[:, None] - 1)[:, 0]
    return torch.stack((count.to(torch.float64), least.to(torch.float64)), dim=1), settled.tolist()


def _first(probabilities: torch.Tensor, count: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Each row's `count` largest, of those equal to the `least` of them the lower ids."""
    least = least.to(probabilities.dtype)[:, None]
    above = probabilities > least
    equal = probabilities == least
    room = count.to(torch.int64)[:, None] - above.sum(dim=-1, keepdim=True)
    kept = above | equal
    if bool((equal.sum(dim=-1, keepdim=True) > room).any()):
        kept = above | (equal & (equal.cumsum(dim=-1) <= room))
    return torch.where(kept, probabilities, 0.0)
