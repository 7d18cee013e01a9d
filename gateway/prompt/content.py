"""What stands inside a document or block: text, UTF-8 bytes, or the key of a block that is known already."""

import re
from collections.abc import Iterator

from drystone.v1 import generation_pb2, prompt_pb2
from shared.errors import InvalidRequestError, Reason

Content = prompt_pb2.Document | prompt_pb2.BlockInput

_BLOCK_KEY = re.compile(r"[0-9a-fA-F]{64}")


def is_block_key(key: str) -> bool:
    """True for 64 hexadecimal digits."""
    return _BLOCK_KEY.fullmatch(key) is not None


def normal_key(key: str) -> str:
    """The one spelling of a block key: lower case."""
    return key.lower()


def content_field(content: Content, path: str) -> str:
    """Path of the member that is set, such as `rag.documents[3].utf8_text`; `path` itself when none is."""
    kind = content.WhichOneof("content")
    return f"{path}.{kind}" if kind else path


def text_of(content: Content, path: str) -> str:
    """Text of a content that is not a block key.

    Raises:
        InvalidRequestError: The bytes are not UTF-8.
    """
    if content.WhichOneof("content") != "utf8_text":
        return content.text
    try:
        return content.utf8_text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            Reason.INVALID_UTF8,
            f"{path}.utf8_text",
            f"is not UTF-8 at byte offset {error.start}",
            value=f"0x{content.utf8_text[error.start]:02x}",
        ) from error


def contents_in(request: generation_pb2.GenerateRequest) -> Iterator[tuple[str, Content]]:
    """Every document or block of the prompt with its path, in order."""
    match request.WhichOneof("prompt"):
        case "rag":
            for index, document in enumerate(request.rag.documents):
                yield f"rag.documents[{index}]", document
        case "blocks":
            for index, block in enumerate(request.blocks.blocks):
                yield f"blocks.blocks[{index}]", block
        case "chat":
            for index, document in enumerate(request.chat.documents):
                yield f"chat.documents[{index}]", document


def block_keys_in(request: generation_pb2.GenerateRequest) -> list[str]:
    """Distinct block keys that the prompt names, in lower case, in order of first use."""
    keys = (normal_key(content.block_key) for _, content in contents_in(request) if content.HasField("block_key"))
    return list(dict.fromkeys(keys))
