"""Builds protobuf requests from what a caller gives. What cannot be sent is refused here; rules are the server's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TypeVar, cast

from drystone._exceptions import InvalidRequestError
from drystone._prompts import Block, Document, GenerateOptions, Message, Template, Truncation
from drystone.v1 import generation_pb2, prompt_pb2, sampling_pb2

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper
    from google.protobuf.message import Message as ProtobufMessage

_Number = TypeVar("_Number", bound=int)

_OPTIONS: Final = GenerateOptions.__annotations__.keys()
_SAMPLING_SCALARS: Final = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
)


def generate_request(question: str | None, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    """The request for `generate` and `stream`.

    Raises:
        TypeError: On an unknown keyword, not exactly one prompt, or a value of the wrong type.
        InvalidRequestError: When a value cannot be carried: out of its type's range, no such name, not Unicode.
    """
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    request = generation_pb2.GenerateRequest(
        model=options.get("model", ""),
        request_id=options.get("request_id", ""),
        tenant=options.get("tenant", ""),
        sampling=_sampling(options),
    )
    try:
        _set_prompt(request, question, options)
    except UnicodeError as error:
        raise InvalidRequestError(
            f"the prompt is not valid Unicode: {error}", reason="INVALID_UTF8", request_id=request.request_id
        ) from error
    if attention := options.get("attention"):
        request.attention = _number(prompt_pb2.Attention, "ATTENTION_", "attention", attention)
    if priority := options.get("priority"):
        request.priority = _number(generation_pb2.Priority, "PRIORITY_", "priority", priority)
    request.keep_tail = bool(options.get("keep_tail", False))
    if truncation := options.get("truncation"):
        request.truncation.CopyFrom(_truncation(truncation))
    if template := options.get("template"):
        request.template.CopyFrom(template_options(template))
    if (samples := options.get("n")) is not None:
        _set(request, "n", samples, "n")
    if (structured := _structured(options)) is not None:
        request.structured_output.CopyFrom(structured)
    return request


def _set_prompt(request: generation_pb2.GenerateRequest, question: str | None, options: GenerateOptions) -> None:
    blocks, messages = options.get("blocks"), options.get("messages")
    documents, instructions = options.get("documents", ()), options.get("instructions")
    prompts = {"question": question, "blocks": blocks, "messages": messages}
    given = [name for name, prompt in prompts.items() if prompt is not None]
    if len(given) != 1:
        raise TypeError(f"give exactly one of question, blocks and messages; got {', '.join(given) or 'none'}")
    if blocks is not None and documents:
        raise TypeError("blocks are the whole prompt: they take no documents")
    if instructions is not None and question is None:
        raise TypeError("instructions go with question; put them into blocks or messages")
    if question is not None:
        rag = prompt_pb2.RagPrompt(question=question, documents=map(document, documents))
        if instructions is not None:
            rag.instructions = instructions
        request.rag.CopyFrom(rag)
    elif blocks is not None:
        request.blocks.CopyFrom(prompt_pb2.BlocksPrompt(blocks=map(_block, blocks)))
    elif messages is not None:
        chat = prompt_pb2.ChatPrompt(messages=map(_message, messages), documents=map(document, documents))
        request.chat.CopyFrom(chat)


def document(given: Document | str) -> prompt_pb2.Document:
    """A document for the wire.

    Raises:
        UnicodeError: When it is not Unicode.
    """
    given = Document(text=given) if isinstance(given, str) else given
    if given.key:
        return prompt_pb2.Document(title=given.title, block_key=given.key)
    if isinstance(given.text, bytes):
        return prompt_pb2.Document(title=given.title, utf8_text=given.text)
    return prompt_pb2.Document(title=given.title, text=given.text)


def _block(given: Block | str) -> prompt_pb2.BlockInput:
    block = Block(text=given) if isinstance(given, str) else given
    if block.key:
        return prompt_pb2.BlockInput(block_key=block.key)
    if isinstance(block.text, bytes):
        return prompt_pb2.BlockInput(utf8_text=block.text)
    return prompt_pb2.BlockInput(text=block.text)


def _message(given: Message | Mapping[str, str]) -> prompt_pb2.ChatMessage:
    message = Message(**given) if isinstance(given, Mapping) else given
    return prompt_pb2.ChatMessage(role=message.role, content=message.content)


def _sampling(options: GenerateOptions) -> sampling_pb2.SamplingParams:
    sampling = sampling_pb2.SamplingParams()
    values: Mapping[str, object] = dict(options)
    for name in _SAMPLING_SCALARS:
        if (value := values.get(name)) is not None:
            _set(sampling, name, value, f"sampling.{name}")
    stop = options.get("stop", ())
    try:
        sampling.stop.extend([stop] if isinstance(stop, str) else stop)
        sampling.stop_token_ids.extend(options.get("stop_token_ids", ()))
        sampling.logit_bias.update(options.get("logit_bias") or {})
    except ValueError as error:
        raise InvalidRequestError(f"sampling: {error}", reason="INVALID_SAMPLING", field="sampling") from error
    return sampling


def _structured(options: GenerateOptions) -> sampling_pb2.StructuredOutput | None:
    schema, regex = options.get("json_schema"), options.get("regex")
    choices, grammar = options.get("choices"), options.get("grammar")
    shapes = {"json_schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    given = [name for name, shape in shapes.items() if shape is not None]
    if len(given) > 1:
        raise TypeError(f"give at most one of json_schema, regex, choices and grammar; got {', '.join(given)}")
    if isinstance(choices, str):
        raise TypeError("choices: a sequence of strings, not a string")
    for name, text in (("regex", regex), ("grammar", grammar)):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name}: a string, not {type(text).__name__}")
    try:
        if schema is not None:
            # Keys keep their order: it is the order in which the answer has them.
            text = schema if isinstance(schema, str) else json.dumps(dict(schema), allow_nan=False)
            return sampling_pb2.StructuredOutput(json_schema=text)
        if choices is not None:
            return sampling_pb2.StructuredOutput(choice=sampling_pb2.StructuredOutput.Choice(options=choices))
        if regex is not None:
            return sampling_pb2.StructuredOutput(regex=regex)
        return None if grammar is None else sampling_pb2.StructuredOutput(grammar=grammar)
    except ValueError as error:
        field = "structured_output"
        raise InvalidRequestError(f"{field}: {error}", reason="INVALID_STRUCTURED_OUTPUT", field=field) from error


def _set(message: ProtobufMessage, name: str, value: object, field: str) -> None:
    try:
        setattr(message, name, value)
    except ValueError as error:
        reason = "INVALID_SAMPLING" if field.startswith("sampling.") else "INVALID_FIELD"
        raise InvalidRequestError(
            f"{field}: {error}", reason=reason, field=field, metadata={"field": field, "value": str(value)}
        ) from error
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def _truncation(given: Truncation | str) -> prompt_pb2.Truncation:
    truncation = given if isinstance(given, Truncation) else None
    side = truncation.side if truncation else str(given)
    message = prompt_pb2.Truncation()
    message.side = _number(prompt_pb2.TruncationSide, "TRUNCATION_SIDE_", "truncation.side", side)
    if truncation and truncation.max_prompt_tokens is not None:
        _set(message, "max_prompt_tokens", truncation.max_prompt_tokens, "truncation.max_prompt_tokens")
    return message


def template_options(given: Template | str) -> prompt_pb2.TemplateOptions:
    """Template options for the wire.

    Raises:
        InvalidRequestError: When the keywords are not JSON.
    """
    template = Template(name=given) if isinstance(given, str) else given
    message = prompt_pb2.TemplateOptions(
        name=template.name,
        enable_thinking=template.enable_thinking,
        block_attention_prefix=template.block_attention_prefix,
        add_bos=template.add_bos,
    )
    if template.chat_template_kwargs is not None:
        try:
            message.chat_template_kwargs.update(cast("dict[str, str]", dict(template.chat_template_kwargs)))
        except ValueError as error:
            field = "template.chat_template_kwargs"
            raise InvalidRequestError(f"{field}: not JSON: {error}", reason="INVALID_FIELD", field=field) from error
    return message


def _number(enum: _EnumTypeWrapper[_Number], prefix: str, field: str, name: str) -> _Number:
    names = [full.removeprefix(prefix).lower() for full in enum.keys()]  # noqa: SIM118 - not a mapping
    if name not in names[1:]:
        raise InvalidRequestError(
            f"{field}: must be one of {', '.join(names[1:])}; value {name}",
            reason="INVALID_FIELD",
            field=field,
            metadata={"field": field, "value": name},
        )
    return enum.Value(f"{prefix}{name.upper()}")
