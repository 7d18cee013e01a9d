"""From an Open message to a request: everything that a gateway says is checked before memory is touched."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Literal

from decode_worker.request import Request, Sink
from decode_worker.text import TextStream
from drystone.v1.sampling_pb2 import SamplingParams
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.internal.v1.decode_pb2 import Open
from shared.kv.checks import check_block, check_token_ids

# Sampling fields that this version cannot do, with the value that asks for nothing.
_NEUTRAL: tuple[tuple[Literal["repetition_penalty", "presence_penalty", "frequency_penalty"], float], ...] = (
    ("repetition_penalty", 1.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
)


class Opener:
    """Makes requests of Open messages for one worker.

    Args:
        model: The served model.
        tokenizer: Its `tokenizers.Tokenizer`.
        incarnation: This life of the worker.
        default_timeout_seconds: Time of a request whose gateway set none.
    """

    def __init__(self, model: ServedModel, tokenizer: object, incarnation: int, default_timeout_seconds: float) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._incarnation = incarnation
        self._default_timeout = default_timeout_seconds
        self._keys = model.key_space()

    def open(self, call_id: int, message: Open, sink: Sink) -> Request:
        """The request; raises DrystoneError for what this worker cannot or must not do."""
        if bytes(message.model_fingerprint) != self._model.fingerprint:
            raise DrystoneError(Reason.MODEL_CHANGED, "the gateway's keys are of another model than this worker's")
        if message.expected_incarnation not in (0, self._incarnation):
            raise DrystoneError(Reason.WORKER_LOST, "this worker has restarted since the gateway looked")
        _refuse_unsupported(message)
        keys = replace(self._keys, tenant_salt=message.tenant_salt)
        for block in message.blocks:
            check_block(block, keys, self._model.vocabulary_size)
        check_token_ids("question", message.question_token_ids, self._model.vocabulary_size)
        sampling = message.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        timeout = message.time_left_ms / 1e3 if message.time_left_ms else self._default_timeout
        request = Request(
            request_id=message.request_id,
            call_id=call_id,
            traceparent=message.traceparent,
            blocks=message.blocks,
            question_ids=message.question_token_ids,
            sampling=sampling,
            stop_ids=stop_ids if sampling.ignore_eos else stop_ids | self._model.eos_token_ids,
            deadline=time.monotonic() + timeout,
            sink=sink,
            text=TextStream(self._tokenizer, message.question_token_ids, sampling.stop),
        )
        if request.prompt_tokens + sampling.max_new_tokens > self._model.context_tokens:
            raise DrystoneError(
                Reason.PROMPT_TOO_LONG,
                f"{request.prompt_tokens} prompt tokens and {sampling.max_new_tokens} new ones do not fit "
                f"the worker's context of {self._model.context_tokens}",
            )
        return request


def _refuse_unsupported(message: Open) -> None:
    """An older worker must say no rather than answer as if it had not been asked."""
    sampling = message.sampling
    asked = [
        *(["n"] if message.n > 1 else []),
        *(["structured_output"] if message.HasField("structured_output") else []),
        *(["resume"] if message.HasField("resume") else []),
        *(["keep_tail"] if message.keep_tail else []),
        *(["reuse_tail"] if message.reuse_tail else []),
        *(["logit_bias"] if sampling.logit_bias else []),
        *(["logprobs"] if sampling.HasField("logprobs") else []),
        *(name for name, neutral in _NEUTRAL if sampling.HasField(name) and getattr(sampling, name) != neutral),
    ]
    if asked:
        raise DrystoneError(Reason.NOT_SUPPORTED, f"this decode worker cannot do: {', '.join(asked)}")
    _refuse_not_finite(sampling)


def _refuse_not_finite(sampling: SamplingParams) -> None:
    for name in ("temperature", "top_p", "min_p"):
        if not math.isfinite(getattr(sampling, name)):
            raise DrystoneError(Reason.INVALID_SAMPLING, f"sampling.{name}: not a finite number")
    if not sampling.max_new_tokens:
        raise DrystoneError(Reason.INVALID_SAMPLING, "sampling.max_new_tokens: at least 1")
