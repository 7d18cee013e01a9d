"""The defaults of sampling, filled in once so that no worker guesses them."""

from drystone.v1 import generation_pb2, sampling_pb2

DEFAULT_MAX_NEW_TOKENS = 128

# `seed` has no fixed default: the gateway draws one. `logprobs` stays absent: that is a value of its own.
_DEFAULTS = sampling_pb2.SamplingParams(
    max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    min_new_tokens=0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
)


def filled_sampling(request: generation_pb2.GenerateRequest, seed: int) -> sampling_pb2.SamplingParams:
    """A copy of the request's sampling with every default written out.

    Args:
        request: A valid request.
        seed: Seed to use when the request gives none.
    """
    filled = sampling_pb2.SamplingParams(seed=seed)
    filled.MergeFrom(_DEFAULTS)
    filled.MergeFrom(request.sampling)
    return filled


def max_new_tokens(sampling: sampling_pb2.SamplingParams) -> int:
    """Most tokens that may be generated, the default filled in."""
    return sampling.max_new_tokens if sampling.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS
