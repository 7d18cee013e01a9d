"""Long documents, cut into chunks that are passages of their own.

    text      |··········window··········|
              |              |···half···^   cut: the last end of a paragraph, of a sentence, or white space in here
    chunk 1   |·······················|
    chunk 2                     |·········  begins `overlap_tokens` before the cut, at a word

The text is tokenised once, and all cuts lie between tokens; then each chunk is tokenised alone, as it will be served,
and made shorter until it has room. Nothing but text, title, options and the tokenizer's files has a say in the cuts.
"""

from drystone.v1.generation_pb2 import Chunking
from gateway.prompt.cutting import Cutter
from gateway.prompt.templates import passage_text
from gateway.prompt.tokenizer import PromptTokenizer
from shared.errors import InvalidRequestError, Reason

MIN_CHUNK_TOKENS = 16

# A title leaves at least one token in so many to the text.
_LEAST_ROOM = 8


def check_chunking(chunking: Chunking, *, most_tokens: int) -> None:
    """Refuses options that no document could be cut by.

    Args:
        chunking: The options; `max_tokens` 0 leaves documents whole.
        most_tokens: Longest block that is served.

    Raises:
        InvalidRequestError: INVALID_FIELD, naming the field.
    """
    if chunking.max_tokens == 0:
        if chunking.overlap_tokens:
            raise _invalid("overlap_tokens", "needs max_tokens", 0, chunking.overlap_tokens)
        return
    if not MIN_CHUNK_TOKENS <= chunking.max_tokens <= most_tokens:
        raise _invalid("max_tokens", "is out of range", f"{MIN_CHUNK_TOKENS} to {most_tokens}", chunking.max_tokens)
    if 2 * chunking.overlap_tokens >= chunking.max_tokens:
        limit = f"< {chunking.max_tokens} / 2"
        raise _invalid("overlap_tokens", "must be less than half of max_tokens", limit, chunking.overlap_tokens)


def chunks_of(
    title: str, text: str, chunking: Chunking, tokenizer: PromptTokenizer, *, allow_special: bool = False
) -> list[str]:
    """Texts of a document's chunks, each of which is a document of its own under the same title.

    Args:
        title: The document's title, which each chunk's passage repeats.
        text: The document's text.
        chunking: Options that `check_chunking` has let pass.
        tokenizer: The model's tokenizer.
        allow_special: Whether passages may spell control tokens, as they will be tokenised when they are served.

    Returns:
        At least one text. A document that fits, or that is not to be cut, is its own only chunk, unchanged; others
        have no white space around them.

    Raises:
        InvalidRequestError: INVALID_FIELD `chunking.max_tokens`: the title leaves no room for text.
    """
    if not chunking.max_tokens:
        return [text]
    passage = tokenizer.encode_with_offsets(passage_text(title, text), allow_special=allow_special)
    if len(passage.ids) <= chunking.max_tokens:
        return [text]
    body = text.strip()
    # The line feed at the passage's end is one token more.
    heading = len(passage_text(title, "")) - 1
    room = chunking.max_tokens - 1 - sum(start < heading for start in passage.starts)
    if not body or room * _LEAST_ROOM < chunking.max_tokens:
        raise _no_room(chunking)
    # A title may take so much room that no chunk would get beyond the whole overlap.
    overlap = min(chunking.overlap_tokens, room // 2)
    cutter = Cutter(body, passage, heading, room=room, overlap=overlap, at_paragraphs=chunking.at_paragraphs)

    def excess(chunk: str) -> int:
        ids = tokenizer.encode(passage_text(title, chunk), allow_special=allow_special)
        return len(ids) - chunking.max_tokens

    # Text before `done` is in chunks; the next chunk begins at `start`, which lies before `done` by the overlap.
    chunks: list[str] = []
    start = done = 0
    while done < cutter.last:
        end = cutter.end_of(start, done, excess)
        if end is not None:
            chunks.append(cutter.text(start, end))
            done = cutter.beyond_space(end)
            repeated = cutter.start_before(end, after=start)
            start = done if repeated is None else repeated
        elif start < done:
            start = done
        else:
            raise _no_room(chunking)
    return chunks


def _no_room(chunking: Chunking) -> InvalidRequestError:
    return _invalid("max_tokens", "leaves no room for text beside the title", None, chunking.max_tokens)


def _invalid(field: str, problem: str, limit: object, value: object) -> InvalidRequestError:
    return InvalidRequestError(Reason.INVALID_FIELD, f"chunking.{field}", problem, limit=limit, value=value)
