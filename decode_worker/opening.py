"""From an Open message to a request: everything that a gateway says is checked before memory is touched."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from decode_worker.request import Request, Sink
from decode_worker.sample import Sample
from decode_worker.sampling import Grammar, Grammars, Sampler, SampleState
from decode_worker.text import TextStream
from drystone.v1.generation_pb2 import Priority
from drystone.v1.sampling_pb2 import FinishReason, ResumeSample, SamplingParams
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, InvalidRequestError, Reason
from shared.internal.v1.decode_pb2 import Open
from shared.kv.checks import check_block, check_token_ids

_FINITE = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Opener:
    """Makes requests of Open messages for one worker.

    Args:
        model: The served model.
        tokenizer: Its `tokenizers.Tokenizer`.
        sampler: Says which sampling it can do.
        incarnation: This life of the worker.
        default_timeout_seconds: Time of a request whose gateway set none.
        max_samples: Most samples of one request.
    """

    def __init__(
        self,
        model: ServedModel,
        tokenizer: Any,
        sampler: Sampler,
        incarnation: int,
        default_timeout_seconds: float,
        max_samples: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._incarnation = incarnation
        self._default_timeout = default_timeout_seconds
        self._max_samples = max_samples
        self._keys = model.key_space()
        self._grammars = Grammars(tokenizer, model.vocabulary_size, model.eos_token_ids)

    def grammar(self, message: Open) -> Grammar | None:
        """The shape that the answer must have. Takes up to seconds: call it on a thread, from any.

        Raises:
            DrystoneError: It is not valid, too complex, or too many are being compiled.
        """
        if not (message.HasField("structured_output") and message.structured_output.WhichOneof("constraint")):
            return None
        return self._grammars.compile(message.structured_output)

    def open(self, call_id: int, message: Open, sink: Sink, grammar: Grammar | None = None) -> Request:
        """The request; raises DrystoneError for what this worker cannot or must not do.

        Touches no state of the worker: a message that takes long to open may be opened on a thread.
        """
        self._check_bounds(message)
        if bytes(message.model_fingerprint) != self._model.fingerprint:
            raise DrystoneError(Reason.MODEL_CHANGED, "the gateway's keys are of another model than this worker's")
        if message.expected_incarnation not in (0, self._incarnation):
            raise DrystoneError(Reason.WORKER_LOST, "this worker has restarted since the gateway looked")
        _check_sampling(message.sampling)
        self._sampler.check(message.sampling)
        keys = replace(self._keys, tenant_salt=message.tenant_salt)
        for block in message.blocks:
            check_block(block, keys, self._model.vocabulary_size)
        check_token_ids("question", message.question_token_ids, self._model.vocabulary_size)
        timeout = message.time_left_ms / 1e3 if message.time_left_ms else self._default_timeout
        request = Request(
            request_id=message.request_id,
            call_id=call_id,
            traceparent=message.traceparent,
            blocks=message.blocks,
            question_ids=message.question_token_ids,
            sampling=message.sampling,
            samples=self._samples(message, grammar),
            deadline=time.monotonic() + timeout,
            sink=sink,
            priority=message.priority,
            keep_tail=message.keep_tail,
            reuse_tail=message.reuse_tail,
            tail_salt=message.tail_salt,
            tenant=message.tenant,
        )
        self._check_context(request)
        return request

    def _samples(self, message: Open, grammar: Grammar | None) -> list[Sample]:
        sampling = message.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        first = SampleState(
            sampling,
            sample_index=0,
            prompt_ids=[*(token for block in message.blocks for token in block.token_ids), *message.question_token_ids],
            stop_ids=stop_ids if sampling.ignore_eos else stop_ids | self._model.eos_token_ids,
            grammar=grammar,
        )
        states = [first, *(first.fork(index) for index in range(1, max(message.n, 1)))]
        resumed = self._resumed(message, len(states))
        return [self._sample(message, state, resumed.get(state.sample_index)) for state in states]

    def _resumed(self, message: Open, samples: int) -> Mapping[int, ResumeSample]:
        if not message.HasField("resume"):
            return {}
        if message.resume.model_fingerprint not in ("", self._model.fingerprint.hex()):
            raise DrystoneError(Reason.MODEL_CHANGED, "resume: the answer was begun by another model than this one")
        for number, past in enumerate(message.resume.samples):
            if past.sample_index >= samples:
                raise _invalid(number, "sample_index", "is not a sample of this request", samples, past.sample_index)
            if len(past.token_ids) > message.sampling.max_new_tokens:
                most = message.sampling.max_new_tokens
                raise _invalid(number, "token_ids", "is longer than max_new_tokens", most, len(past.token_ids))
            if past.token_ids:
                check_token_ids(f"resume.samples[{number}]", past.token_ids, self._model.vocabulary_size)
        return {past.sample_index: past for past in message.resume.samples}

    def _sample(self, message: Open, state: SampleState, past: ResumeSample | None) -> Sample:
        text = TextStream(self._tokenizer, message.question_token_ids, message.sampling.stop)
        sample = Sample(state, text)
        if past is not None:
            sample.finished = past.finished
            sample.resumed = tuple(past.token_ids)
            said = _replay(sample, message.sampling, past)
            if not past.finished:
                # An answer's end tells what had been held back; the caller may have got that and not the end itself.
                early = max(0, past.text_chars - len(said))
                if early > len(sample.text.held):
                    problem, most = "is more text than these tokens make", len(said) + len(sample.text.held)
                    raise _invalid(past.sample_index, "text_chars", problem, most, past.text_chars)
                sample.text.told(early)
                sample.untold = said[past.text_chars :]
                sample.over = _why_over(sample, message.sampling)
                sample.finished = sample.over is not None
        return sample

    def _check_bounds(self, message: Open) -> None:
        """What would cost memory before anything else is looked at."""
        for name, value, most in (
            ("n", message.n, self._max_samples),
            ("sampling.logprobs", message.sampling.logprobs, self._model.vocabulary_size),
            ("priority", message.priority, max(Priority.values())),
        ):
            if value > most:
                raise InvalidRequestError(Reason.INVALID_FIELD, name, "is too large", limit=most, value=value)
        if message.tail_salt != message.tenant_salt:
            raise DrystoneError(Reason.INTERNAL, "tail_salt and tenant_salt are of different tenants")

    def _check_context(self, request: Request) -> None:
        if request.prompt_tokens + request.sampling.max_new_tokens > self._model.context_tokens:
            raise DrystoneError(
                Reason.PROMPT_TOO_LONG,
                f"{request.prompt_tokens} prompt tokens and {request.sampling.max_new_tokens} new ones do not fit "
                f"the worker's context of {self._model.context_tokens}",
            )


def _replay(sample: Sample, sampling: SamplingParams, past: ResumeSample) -> str:
    """Takes the past in as if it had just been generated; the text that was certain by then."""
    said = []
    for place, token in enumerate(past.token_ids):
        if sample.text.matched_stop or token in sample.state.stop_ids:
            problem = "goes on after the answer's end"
            raise _invalid(past.sample_index, "token_ids", problem, place, len(past.token_ids))
        try:
            sample.state.accept(token)
        except DrystoneError as error:
            problem = f"is not an answer to this request: {error.message}"
            raise _invalid(past.sample_index, "token_ids", problem, place, token) from error
        said.append(sample.text.push(token, may_stop=place + 1 >= sampling.min_new_tokens))
    if _why_over(sample, sampling) is not None:
        said.append(sample.text.finish())
    return "".join(said)


def _why_over(sample: Sample, sampling: SamplingParams) -> FinishReason.ValueType | None:
    if sample.text.matched_stop or sample.state.complete:
        return FinishReason.FINISH_REASON_STOP
    if len(sample.generated) >= sampling.max_new_tokens:
        return FinishReason.FINISH_REASON_LENGTH
    return None


def _check_sampling(sampling: SamplingParams) -> None:
    """What a gateway has checked already, for those that did not: numbers that would spoil a whole step."""
    numbers: Sequence[tuple[str, float]] = [
        *((name, getattr(sampling, name)) for name in _FINITE),
        *((f"logit_bias[{token}]", bias) for token, bias in sampling.logit_bias.items()),
    ]
    for name, value in numbers:
        if not math.isfinite(value):
            raise DrystoneError(Reason.INVALID_SAMPLING, f"sampling.{name}: not a finite number")
    if sampling.HasField("repetition_penalty") and sampling.repetition_penalty <= 0:
        raise DrystoneError(Reason.INVALID_SAMPLING, "sampling.repetition_penalty: must be above 0")
    if not sampling.max_new_tokens:
        raise DrystoneError(Reason.INVALID_SAMPLING, "sampling.max_new_tokens: at least 1")


def _invalid(number: int, name: str, problem: str, limit: object, value: object) -> InvalidRequestError:
    return InvalidRequestError(
        Reason.INVALID_FIELD, f"resume.samples[{number}].{name}", problem, limit=limit, value=value
    )
