"""Choosing tokens: what a sample has behind it, what it may say next, and one pass over the batch that chooses.

Order of one choice: repetition penalty, frequency and presence penalty, logit bias, tokens that must not come
(ends that are too early, then the grammar), temperature, min_p, top_k, top_p, one uniform draw. Log
probabilities are of the logits before all of that. docs/sampling.md is the page for users.
"""

from decode_worker.sampling.draws import uniform
from decode_worker.sampling.grammar import Grammar
from decode_worker.sampling.grammars import Grammars
from decode_worker.sampling.sampler import Choice, Sampler
from decode_worker.sampling.state import SampleState

__all__ = ["Choice", "Grammar", "Grammars", "SampleState", "Sampler", "uniform"]
