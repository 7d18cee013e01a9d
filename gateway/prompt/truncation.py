"""Making a prompt fit: refuse it, drop whole passages, or cut tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from drystone.v1.generation_pb2 import GenerateRequest
from drystone.v1.prompt_pb2 import TruncationSide
from gateway.prompt.plan import PlannedBlock
from gateway.prompt.sampling import max_new_tokens
from shared.errors import InvalidRequestError, Reason

# No text has so many bytes to a token: a longer prompt is refused before it is tokenised.
_BYTES_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens that a prompt may have, and what gives way beyond them.

    Args:
        tokens: Longest prompt; at least 1.
        because: Where that number comes from, in words.
        side: `TruncationSide` value.
        field: Path that errors name.
    """

    tokens: int
    because: str
    side: int
    field: str

    @property
    def refuses(self) -> bool:
        """True when nothing gives way."""
        return self.side not in (TruncationSide.TRUNCATION_SIDE_LEFT, TruncationSide.TRUNCATION_SIDE_RIGHT)

    @property
    def cuts_left(self) -> bool:
        """True when the front gives way."""
        return self.side == TruncationSide.TRUNCATION_SIDE_LEFT

    def refusal(self, needed: int, advice: str) -> InvalidRequestError:
        """The error of a prompt that needs more."""
        problem = f"the prompt is longer than {self.because}, in tokens ({advice})"
        return InvalidRequestError(Reason.PROMPT_TOO_LONG, self.field, problem, limit=self.tokens, value=needed)


def room_for(request: GenerateRequest, context_tokens: int, server_limit: int | None) -> Room:
    """Room that a request has.

    Args:
        request: A valid request.
        context_tokens: Longest prompt and answer together.
        server_limit: Longest prompt that the server takes, beside the context.

    Raises:
        InvalidRequestError: The answer alone fills the context.
    """
    answer = max_new_tokens(request.sampling)
    if answer >= context_tokens:
        raise InvalidRequestError(
            Reason.INVALID_SAMPLING,
            "sampling.max_new_tokens",
            f"leaves no room for a prompt in the model's context of {context_tokens} tokens",
            limit=context_tokens - 1,
            value=answer,
        )
    bounds = [(context_tokens - answer, f"the context of {context_tokens} less max_new_tokens {answer}")]
    if server_limit is not None:
        bounds.append((server_limit, "this server's limit"))
    if request.truncation.HasField("max_prompt_tokens"):
        bounds.append((request.truncation.max_prompt_tokens, "truncation.max_prompt_tokens"))
    tokens, because = min(bounds)
    return Room(tokens, because, request.truncation.side, request.WhichOneof("prompt") or "prompt")


def refuse_hopeless(texts: Iterable[str], context_tokens: int, room: Room) -> None:
    """Refuse texts that are far too long, without the work of tokenising them.

    Args:
        texts: All texts of a prompt.
        context_tokens: Longest prompt and answer together.
        room: Room that there is.

    Raises:
        InvalidRequestError: They have more bytes than any text that fits the context.
    """
    if not room.refuses:
        return
    size, limit = sum(len(text.encode()) for text in texts), context_tokens * _BYTES_PER_TOKEN
    if size > limit:
        problem = f"the prompt is far longer than the context of {context_tokens} tokens, in bytes (send less text)"
        raise InvalidRequestError(Reason.PROMPT_TOO_LONG, room.field, problem, limit=limit, value=size)


def drop_passages(
    blocks: Sequence[PlannedBlock], fixed_tokens: int, room: Room
) -> tuple[list[PlannedBlock], list[PlannedBlock]]:
    """Blocks kept and blocks dropped, both in prompt order. Only blocks with a document give way.

    Args:
        blocks: All blocks but the question.
        fixed_tokens: Tokens of the prompt outside those blocks.
        room: Room that there is.

    Raises:
        InvalidRequestError: It does not fit, whatever may be dropped.
    """
    needed = fixed_tokens + sum(len(block.token_ids) for block in blocks)
    if needed > room.tokens and room.refuses:
        raise room.refusal(needed, "set truncation.side to LEFT or RIGHT to drop documents, or send fewer")
    droppable = [index for index, block in enumerate(blocks) if block.document_index is not None]
    given_up = set[int]()
    for index in droppable if room.cuts_left else reversed(droppable):
        if needed <= room.tokens:
            break
        given_up.add(index)
        needed -= len(blocks[index].token_ids)
    if needed > room.tokens:
        raise room.refusal(needed, "even without any document; shorten the rest")
    kept = [block for index, block in enumerate(blocks) if index not in given_up]
    return kept, [blocks[index] for index in sorted(given_up)]


def cut_tokens(ids: tuple[int, ...], room: Room) -> tuple[int, ...]:
    """The ids that fit.

    Raises:
        InvalidRequestError: They do not fit, and nothing gives way.
    """
    if len(ids) <= room.tokens:
        return ids
    if room.refuses:
        raise room.refusal(len(ids), "set truncation.side to LEFT or RIGHT to cut it, or shorten it")
    return ids[-room.tokens :] if room.cuts_left else ids[: room.tokens]
