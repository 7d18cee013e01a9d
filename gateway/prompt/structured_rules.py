"""Rules on `structured_output`: one error each. What only a compiler can see, the decode worker says."""

import json

from drystone.v1.sampling_pb2 import StructuredOutput
from gateway.prompt.limits import PromptLimits
from shared.errors import InvalidRequestError, Reason

_FIELD = "structured_output"


def check_structured(structured: StructuredOutput, limits: PromptLimits) -> None:
    """Refuse a constraint that is missing, empty, too long, or no JSON where JSON is due.

    Raises:
        InvalidRequestError: INVALID_STRUCTURED_OUTPUT; the first rule that is broken.
    """
    match structured.WhichOneof("constraint"):
        case "json_schema":
            _check_text("json_schema", structured.json_schema, limits.max_constraint_bytes)
            _check_schema(structured.json_schema)
        case "regex":
            _check_text("regex", structured.regex, limits.max_constraint_bytes)
        case "grammar":
            _check_text("grammar", structured.grammar, limits.max_grammar_bytes)
        case "choice":
            _check_choice(structured.choice, limits)
        case _:
            raise _invalid("", "has no constraint; set one of json_schema, regex, choice or grammar")


def _check_text(name: str, text: str, most: int) -> None:
    if not text.strip():
        raise _invalid(name, "is empty")
    if (size := len(text.encode())) > most:
        raise _invalid(name, "is too long, in bytes", limit=most, value=size)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise _invalid("json_schema", "is not JSON", value=str(error)) from None
    except RecursionError:
        raise _invalid("json_schema", "is nested too deeply") from None
    if schema is not True and not isinstance(schema, dict):
        raise _invalid("json_schema", "must be a JSON object, or true", value=type(schema).__name__)


def _check_choice(choice: StructuredOutput.Choice, limits: PromptLimits) -> None:
    count = len(choice.options)
    if not count:
        raise _invalid("choice.options", "is empty", limit=">= 1", value=0)
    if count > limits.max_options:
        raise _invalid("choice.options", "has too many entries", limit=limits.max_options, value=count)
    for index, option in enumerate(choice.options):
        if not option:
            raise _invalid(f"choice.options[{index}]", "is empty")
    if (size := sum(len(option.encode()) for option in choice.options)) > limits.max_constraint_bytes:
        raise _invalid(
            "choice.options", "are too long together, in bytes", limit=limits.max_constraint_bytes, value=size
        )


def _invalid(name: str, problem: str, *, limit: object = None, value: object = None) -> InvalidRequestError:
    field = f"{_FIELD}.{name}" if name else _FIELD
    return InvalidRequestError(Reason.INVALID_STRUCTURED_OUTPUT, field, problem, limit=limit, value=value)
