"""Every rule on a `GenerateRequest`, checked once, at the edge."""

from drystone.v1.generation_pb2 import GenerateRequest, Priority
from drystone.v1.prompt_pb2 import Attention, TruncationSide
from drystone.v1.sampling_pb2 import Resume
from gateway.prompt.content import is_block_key
from gateway.prompt.limits import PromptLimits
from gateway.prompt.prompt_rules import check_blocks, check_chat, check_rag
from gateway.prompt.sampling import max_new_tokens
from gateway.prompt.sampling_rules import check_sampling
from gateway.prompt.structured_rules import check_structured
from gateway.tenants import check_tenant
from shared.errors import InvalidRequestError, Reason


def validate(request: GenerateRequest, limits: PromptLimits) -> None:
    """Refuse a request that breaks a rule.

    Args:
        request: The request as it came in.
        limits: Upper bounds of this server.

    Raises:
        InvalidRequestError: One rule is broken; names the field, the limit and the value.
    """
    _check_prompt(request, limits)
    _check_enums(request)
    _check_envelope(request, limits)
    check_sampling(request.sampling, limits)
    if request.HasField("structured_output"):
        check_structured(request.structured_output, limits)
    if request.HasField("resume"):
        _check_resume(request, request.resume)


def _check_prompt(request: GenerateRequest, limits: PromptLimits) -> None:
    match request.WhichOneof("prompt"):
        case "rag":
            check_rag(request.rag, limits)
        case "blocks":
            check_blocks(request.blocks, limits)
        case "chat":
            check_chat(request.chat, limits)
        case _:
            raise InvalidRequestError(Reason.EMPTY_PROMPT, "prompt", "is missing; set one of rag, blocks or chat")


def _check_enums(request: GenerateRequest) -> None:
    for field, value, kind in (
        ("attention", request.attention, Attention),
        ("truncation.side", request.truncation.side, TruncationSide),
        ("priority", request.priority, Priority),
    ):
        if value not in kind.values():
            known = f"{min(kind.values())} to {max(kind.values())}"
            raise InvalidRequestError(Reason.INVALID_FIELD, field, "is not a known value", limit=known, value=value)


def _check_envelope(request: GenerateRequest, limits: PromptLimits) -> None:
    if request.HasField("n") and not 1 <= request.n <= limits.max_n:
        raise _invalid("n", "is out of range", f"1 to {limits.max_n}", request.n)
    if len(request.request_id) > limits.max_request_id:
        raise _invalid("request_id", "has too many characters", limits.max_request_id, len(request.request_id))
    if not request.request_id.isprintable():
        raise _invalid("request_id", "must be printable", "printable characters", repr(request.request_id))
    check_tenant(request.tenant)
    if request.HasField("timeout_ms") and request.timeout_ms == 0:
        raise _invalid("timeout_ms", "must be at least 1; leave it out for the server's default", ">= 1", 0)
    if request.truncation.HasField("max_prompt_tokens") and request.truncation.max_prompt_tokens == 0:
        raise _invalid("truncation.max_prompt_tokens", "must be at least 1", ">= 1", 0)


def _check_resume(request: GenerateRequest, resume: Resume) -> None:
    if not resume.samples:
        raise _invalid("resume.samples", "has no entry", ">= 1", 0)
    if not is_block_key(resume.model_fingerprint):
        value = repr(resume.model_fingerprint[:80])
        raise _invalid("resume.model_fingerprint", "must be 64 hexadecimal digits", 64, value)
    if not request.sampling.HasField("seed"):
        raise InvalidRequestError(
            Reason.INVALID_FIELD, "sampling.seed", "is missing; a resumed request needs the seed of its Started event"
        )
    samples, most = max(request.n, 1), max_new_tokens(request.sampling)
    seen = set[int]()
    for index, sample in enumerate(resume.samples):
        path = f"resume.samples[{index}]"
        if sample.sample_index >= samples:
            raise _invalid(
                f"{path}.sample_index", "is not a sample of this request", f"< {samples}", sample.sample_index
            )
        if sample.sample_index in seen:
            raise _invalid(f"{path}.sample_index", "appears twice", 1, sample.sample_index)
        seen.add(sample.sample_index)
        if len(sample.token_ids) > most:
            raise _invalid(f"{path}.token_ids", "is longer than max_new_tokens", most, len(sample.token_ids))


def _invalid(field: str, problem: str, limit: object, value: object) -> InvalidRequestError:
    return InvalidRequestError(Reason.INVALID_FIELD, field, problem, limit=limit, value=value)
