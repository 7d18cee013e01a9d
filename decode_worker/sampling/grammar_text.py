"""From a StructuredOutput to the text that the grammar library compiles."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from llguidance import LLMatcher, grammar_from

from drystone.v1.sampling_pb2 import StructuredOutput
from shared.errors import InvalidRequestError, Reason

# The gateway has its own limits; these hold whatever it does. The compiling thread's stack is sized for the first. A
# grammar is text that a chain of rules makes slow out of proportion: 16 KiB take up to 5 seconds, 32 KiB 18.
MAX_BYTES = 128 * 1024
_MAX_GRAMMAR_BYTES = 16 * 1024
# Between JSON's signs. Bounded, so that no model can fill an answer with blanks.
_JSON_BLANKS = r"[ \n\r\t]{1,40}"
# The library makes a state for each remainder, in time and memory: 100 000 take 0.4 s and 30 MB.
_MAX_MULTIPLE = 100_000


def grammar_text(structured: StructuredOutput) -> str:
    """The constraint in the library's own form.

    Raises:
        InvalidRequestError: INVALID_STRUCTURED_OUTPUT; what is wrong, as far as no compiling is needed to see it.
    """
    kind = structured.WhichOneof("constraint")
    if kind is None:
        raise unusable("structured_output", "has no constraint")
    field = f"structured_output.{kind}"
    most = _MAX_GRAMMAR_BYTES if kind == "grammar" else MAX_BYTES
    if structured.ByteSize() > most:
        raise unusable(field, "is too long, in bytes", limit=most, value=structured.ByteSize())
    if kind == "json_schema":
        schema = _parsed(structured.json_schema)
        if schema is True:
            return LLMatcher.grammar_from_json_schema("{}", overrides={"whitespace_pattern": _JSON_BLANKS})
        if not isinstance(schema, dict):
            raise unusable(field, "must be a JSON object, or true")
        _check_multiples(schema)
        return LLMatcher.grammar_from_json_schema(
            structured.json_schema, overrides={"whitespace_pattern": _JSON_BLANKS}
        )
    if kind == "regex":
        return LLMatcher.grammar_from_regex(structured.regex)
    if kind == "choice":
        if not structured.choice.options or not all(structured.choice.options):
            raise unusable(field, "needs at least one option, and none that is empty")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, structured.choice.options)))
    try:
        return grammar_from("ebnf", structured.grammar)
    except ValueError as error:
        raise unusable(field, str(error)) from None


def unusable(field: str, problem: str, *, limit: object = None, value: object = None) -> InvalidRequestError:
    """The constraint cannot be used."""
    return InvalidRequestError(Reason.INVALID_STRUCTURED_OUTPUT, field, problem, limit=limit, value=value)


def _parsed(schema: str) -> Any:
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise unusable("structured_output.json_schema", f"is not JSON: {error}") from None


def _check_multiples(schema: object) -> None:
    """Refuse divisors whose common multiple would make a grammar without bound."""
    common, scale = 1, 1  # the common multiple, in parts of 1 / scale
    for value in _multiples(schema):
        divisor = Fraction(str(value))
        finer = math.lcm(scale, divisor.denominator)
        common = math.lcm(common * (finer // scale), divisor.numerator * (finer // divisor.denominator))
        scale = finer
        if _without_zeros(common) > _MAX_MULTIPLE:
            raise unusable(
                "structured_output.json_schema", "has too large a multipleOf", limit=_MAX_MULTIPLE, value=value
            )


def _without_zeros(number: int) -> int:
    # Powers of ten are a matter of the last digits alone and cost nothing.
    while number % 10 == 0:
        number //= 10
    return number


def _multiples(schema: object) -> Iterator[float]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            multiple = node.get("multipleOf")
            if isinstance(multiple, int | float) and 0 < multiple < math.inf:
                yield multiple
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
