"""Which template a request gets, and with which keywords."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from google.protobuf import struct_pb2

from drystone.v1.prompt_pb2 import TemplateOptions
from gateway.prompt.chat_template import ChatTemplate
from gateway.prompt.templates import CARD, PLAIN, TULU, Template, TextTemplate
from gateway.prompt.tokenizer import PromptTokenizer
from shared.errors import InvalidRequestError, Reason

_TEXT_TEMPLATES: Mapping[str, TextTemplate] = {template.name: template for template in (TULU, CARD, PLAIN)}
TEMPLATE_NAMES = ("chat", *_TEXT_TEMPLATES)


@dataclass(frozen=True, slots=True)
class TemplateDefaults:
    """What a model's prompts look like when a request does not say.

    Args:
        name: Template name, or "auto": the model's chat template if it has one, else "plain".
        block_attention_prefix: Prepend "[Block-Attention]" to the first block of BLOCK prompts.
        bos: "always" or "never" prepend the BOS token to the first block; "auto" does so for "plain" alone, when
            the tokenizer itself would (chat templates write their own; "tulu" and "card" were trained without).
            No block begins with BOS twice.
        chat_template_kwargs: Keywords for the chat template.
        special_tokens_in_documents: Let documents spell control tokens. Only for documents that are trusted.
    """

    name: str = "auto"
    block_attention_prefix: bool = False
    bos: Literal["auto", "always", "never"] = "auto"
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    special_tokens_in_documents: bool = False

    def resolved_name(self, tokenizer: PromptTokenizer) -> str:
        """Template of a request that names none."""
        if self.name != "auto":
            return self.name
        return "chat" if tokenizer.has_chat_template else PLAIN.name

    def check(self, tokenizer: PromptTokenizer) -> None:
        """Refuse settings that no request could be served with.

        Raises:
            ValueError: Naming the setting.
        """
        name = self.resolved_name(tokenizer)
        if name not in TEMPLATE_NAMES:
            raise ValueError(f"template {name!r} is unknown; known: auto, {', '.join(TEMPLATE_NAMES)}")
        if name == "chat" and not tokenizer.has_chat_template:
            raise ValueError("template 'chat' needs a tokenizer with a chat template")
        if self.bos == "always" and tokenizer.bos_token_id is None:
            raise ValueError("bos 'always' needs a tokenizer with a BOS token")
        if taken := sorted(tokenizer.reserved_template_kwargs.intersection(self.chat_template_kwargs)):
            raise ValueError(f"chat_template_kwargs: {', '.join(taken)} are set by the server")


def choose_template(options: TemplateOptions, defaults: TemplateDefaults, tokenizer: PromptTokenizer) -> Template:
    """Template that a request asks for.

    Raises:
        InvalidRequestError: The name is unknown, or a keyword belongs to the server.
    """
    name = options.name if options.HasField("name") else defaults.resolved_name(tokenizer)
    kwargs = _template_kwargs(options, defaults, tokenizer)
    if name == "chat":
        if not tokenizer.has_chat_template:
            raise InvalidRequestError(
                Reason.INVALID_TEMPLATE, "template.name", "the model has no chat template", limit=_known(), value="chat"
            )
        return ChatTemplate(tokenizer, kwargs)
    if name not in _TEXT_TEMPLATES:
        raise InvalidRequestError(
            Reason.INVALID_TEMPLATE, "template.name", "is not a known template", limit=_known(), value=repr(name)
        )
    return _TEXT_TEMPLATES[name]


def wants_bos(
    options: TemplateOptions, defaults: TemplateDefaults, tokenizer: PromptTokenizer, *, by_itself: bool
) -> bool:
    """True when the first block begins with BOS.

    Args:
        options: The request's options.
        defaults: The model's settings.
        tokenizer: The model's tokenizer.
        by_itself: What "auto" means for this prompt.

    Raises:
        InvalidRequestError: The request asks for BOS and the tokenizer has none.
    """
    if options.HasField("add_bos"):
        if options.add_bos and tokenizer.bos_token_id is None:
            raise InvalidRequestError(Reason.INVALID_FIELD, "template.add_bos", "the tokenizer has no BOS token")
        return options.add_bos
    return by_itself and tokenizer.adds_bos if defaults.bos == "auto" else defaults.bos == "always"


def _known() -> str:
    return ", ".join(TEMPLATE_NAMES)


def _template_kwargs(
    options: TemplateOptions, defaults: TemplateDefaults, tokenizer: PromptTokenizer
) -> dict[str, object]:
    asked = {name: _plain(value) for name, value in options.chat_template_kwargs.fields.items()}
    for name in asked:
        if name in tokenizer.reserved_template_kwargs:
            field_name = f"template.chat_template_kwargs.{name}"
            raise InvalidRequestError(Reason.INVALID_FIELD, field_name, "is set by the server")
    kwargs = {**defaults.chat_template_kwargs, **asked}
    if options.HasField("enable_thinking"):
        kwargs["enable_thinking"] = options.enable_thinking
    return kwargs


def _plain(value: struct_pb2.Value) -> object:
    """A JSON value as templates expect it: a Struct carries integers as floats."""
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {name: _plain(item) for name, item in value.struct_value.fields.items()}
        case "list_value":
            return [_plain(item) for item in value.list_value.values]
        case _:
            return None
