"""A prompt cut into segments: preamble, passages, question. The last one is always the question."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from drystone.v1.generation_pb2 import GenerateRequest
from drystone.v1.prompt_pb2 import Document
from drystone.v1.statistics_pb2 import BlockRole
from gateway.prompt.content import Content, content_field, contents_in, normal_key, text_of
from gateway.prompt.templates import Frame, Template, passage_text
from shared.errors import InvalidRequestError, Reason

KnownBlocks = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of a prompt before it is tokenised: a text, or the ids of a block that is known already.

    Args:
        role: `BlockRole` value.
        field: Path of the request field it came from.
        text: Its text; empty when it came as a block key.
        known_ids: Ids of the block key that it came as.
        from_document: True when a document speaks, and not the caller or the template.
        document_index: Index of its document or block.
    """

    role: int
    field: str
    text: str = ""
    known_ids: tuple[int, ...] | None = None
    from_document: bool = False
    document_index: int | None = None


def segments_of(request: GenerateRequest, template: Template, known_blocks: KnownBlocks) -> list[Segment]:
    """Segments of a valid request in prompt order.

    Raises:
        DrystoneError: The template cannot render it, or a block key is not known.
    """
    match request.WhichOneof("prompt"):
        case "rag":
            rag = request.rag
            instructions = rag.instructions if rag.HasField("instructions") else None
            frame = template.rag(instructions, rag.question)
            return _framed(frame, "rag.instructions", _passages(request, known_blocks), "rag.question")
        case "chat":
            messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
            frame = template.chat(messages, documents=bool(request.chat.documents))
            return _framed(frame, "chat.messages", _passages(request, known_blocks), "chat.messages")
        case _:
            return list(_exact(request, known_blocks))


def passage_segment(field: str, document: Document, known_blocks: KnownBlocks, index: int | None = None) -> Segment:
    """The segment of one document."""
    if document.HasField("block_key"):
        return _known(field, document, known_blocks, index)
    text = passage_text(document.title, text_of(document, field))
    return Segment(
        BlockRole.BLOCK_ROLE_PASSAGE,
        content_field(document, field),
        text=text,
        from_document=True,
        document_index=index,
    )


def _framed(frame: Frame, preamble_field: str, passages: Sequence[Segment], question_field: str) -> list[Segment]:
    preamble = Segment(BlockRole.BLOCK_ROLE_PREAMBLE, preamble_field, text=frame.preamble)
    question = Segment(BlockRole.BLOCK_ROLE_QUESTION, question_field, text=frame.question)
    return [preamble, *passages, question]


def _passages(request: GenerateRequest, known_blocks: KnownBlocks) -> list[Segment]:
    documents = request.rag.documents if request.WhichOneof("prompt") == "rag" else request.chat.documents
    paths = (field for field, _ in contents_in(request))
    return [
        passage_segment(field, document, known_blocks, index)
        for index, (field, document) in enumerate(zip(paths, documents, strict=True))
    ]


def _exact(request: GenerateRequest, known_blocks: KnownBlocks) -> Iterator[Segment]:
    last = len(request.blocks.blocks) - 1
    for index, (field, block) in enumerate(contents_in(request)):
        if block.HasField("block_key"):
            yield _known(field, block, known_blocks, index)
            continue
        role = BlockRole.BLOCK_ROLE_QUESTION if index == last else BlockRole.BLOCK_ROLE_PASSAGE
        yield Segment(role, content_field(block, field), text=text_of(block, field), document_index=index)


def _known(field: str, content: Content, known_blocks: KnownBlocks, index: int | None) -> Segment:
    ids = known_blocks.get(normal_key(content.block_key))
    if ids is None:
        raise InvalidRequestError(
            Reason.UNKNOWN_BLOCK_KEY,
            f"{field}.block_key",
            "names no block that lives; send its text instead",
            value=content.block_key,
        )
    role = BlockRole.BLOCK_ROLE_PASSAGE
    return Segment(role, f"{field}.block_key", known_ids=tuple(ids), document_index=index)
