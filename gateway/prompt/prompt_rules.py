"""Rules on the prompt itself: documents, blocks and messages."""

from collections.abc import Sequence

from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt, ChatMessage, ChatPrompt, Document, RagPrompt
from gateway.prompt.content import Content, content_field, is_block_key, text_of
from gateway.prompt.limits import PromptLimits
from shared.errors import InvalidRequestError, Reason


def check_rag(prompt: RagPrompt, limits: PromptLimits) -> None:
    """Refuse a `rag` prompt that lacks a part or has too much of one."""
    if not prompt.documents:
        raise InvalidRequestError(
            Reason.NO_DOCUMENTS, "rag.documents", "has no document; ask with `chat` to do without"
        )
    _check_size("rag.instructions", prompt.instructions, limits.max_instructions_bytes)
    check_documents("rag.documents", prompt.documents, limits)
    if not prompt.question.strip():
        raise InvalidRequestError(Reason.EMPTY_PROMPT, "rag.question", "is empty")
    _check_size("rag.question", prompt.question, limits.max_question_bytes)


def check_blocks(prompt: BlocksPrompt, limits: PromptLimits) -> None:
    """Refuse a `blocks` prompt with missing, empty or oversized blocks."""
    if not prompt.blocks:
        raise InvalidRequestError(Reason.EMPTY_PROMPT, "blocks.blocks", "has no block")
    _check_count("blocks.blocks", len(prompt.blocks), limits.max_blocks)
    last = len(prompt.blocks) - 1
    for index, block in enumerate(prompt.blocks[:last]):
        _check_block(f"blocks.blocks[{index}]", block, limits, Reason.EMPTY_DOCUMENT)
    if prompt.blocks[last].HasField("block_key"):
        field = f"blocks.blocks[{last}].block_key"
        raise InvalidRequestError(
            Reason.INVALID_FIELD, field, "the last block attends to all others and needs its text"
        )
    _check_block(f"blocks.blocks[{last}]", prompt.blocks[last], limits, Reason.EMPTY_PROMPT)


def check_chat(prompt: ChatPrompt, limits: PromptLimits) -> None:
    """Refuse a conversation without a turn to answer."""
    if not prompt.messages:
        raise InvalidRequestError(Reason.EMPTY_PROMPT, "chat.messages", "has no message")
    _check_count("chat.messages", len(prompt.messages), limits.max_messages)
    for index, message in enumerate(prompt.messages):
        _check_message(f"chat.messages[{index}]", message, limits)
    if not prompt.messages[-1].content.strip():
        field = f"chat.messages[{len(prompt.messages) - 1}].content"
        raise InvalidRequestError(Reason.EMPTY_PROMPT, field, "is empty in the last message")
    check_documents("chat.documents", prompt.documents, limits)


def check_documents(path: str, documents: Sequence[Document], limits: PromptLimits) -> None:
    """Refuse documents that are too many, too large, empty, or named by a key that is none."""
    _check_count(path, len(documents), limits.max_documents)
    for index, document in enumerate(documents):
        check_document(f"{path}[{index}]", document, limits)


def check_document(path: str, document: Document, limits: PromptLimits) -> None:
    """Refuse a document that is too large, empty, or named by a key that is none."""
    if document.HasField("block_key"):
        _check_key(path, document)
        if document.title:
            raise InvalidRequestError(
                Reason.INVALID_FIELD, f"{path}.title", "must be empty beside block_key, which holds the title already"
            )
        return
    _check_size(f"{path}.title", document.title, limits.max_title_bytes)
    if not _checked_text(path, document, limits).strip():
        raise InvalidRequestError(Reason.EMPTY_DOCUMENT, content_field(document, path), "has no content")


def _check_block(path: str, block: BlockInput, limits: PromptLimits, empty: Reason) -> None:
    if block.HasField("block_key"):
        _check_key(path, block)
    elif not _checked_text(path, block, limits):
        raise InvalidRequestError(empty, content_field(block, path), "has no content")


def _check_message(path: str, message: ChatMessage, limits: PromptLimits) -> None:
    if not message.role.strip():
        raise InvalidRequestError(Reason.INVALID_FIELD, f"{path}.role", "is empty")
    _check_size(f"{path}.role", message.role, limits.max_role_bytes)
    _check_size(f"{path}.content", message.content, limits.max_message_bytes)


def _checked_text(path: str, content: Content, limits: PromptLimits) -> str:
    if content.WhichOneof("content") == "utf8_text":
        _check_bytes(f"{path}.utf8_text", len(content.utf8_text), limits.max_document_bytes)
    text = text_of(content, path)
    _check_size(content_field(content, path), text, limits.max_document_bytes)
    return text


def _check_key(path: str, content: Content) -> None:
    if not is_block_key(content.block_key):
        raise InvalidRequestError(
            Reason.INVALID_BLOCK_KEY,
            f"{path}.block_key",
            "must be 64 hexadecimal digits",
            limit=64,
            value=repr(content.block_key[:80]),
        )


def _check_count(path: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequestError(Reason.TOO_MANY_DOCUMENTS, path, "has too many entries", limit=limit, value=count)


def _check_size(path: str, text: str, limit: int) -> None:
    # A character is one to four bytes, so short texts need no encoding to be measured.
    if len(text) * 4 > limit:
        _check_bytes(path, len(text.encode()), limit)


def _check_bytes(path: str, size: int, limit: int) -> None:
    if size > limit:
        raise InvalidRequestError(Reason.DOCUMENT_TOO_LARGE, path, "is too large, in bytes", limit=limit, value=size)
