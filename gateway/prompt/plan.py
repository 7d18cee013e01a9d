"""A prompt ready to be placed: token ids of every block, in order."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """One block but the last.

    Args:
        role: `BlockRole` value.
        token_ids: Its tokens; at least one.
        document_index: Index of its document (of its block, in a `blocks` prompt). None: it holds no single document.
        store: Keep its KV after the request.
        text: Its text. None when it came as a block key, or for the block of a FULL prompt.
    """

    role: int
    token_ids: tuple[int, ...]
    document_index: int | None
    store: bool
    text: str | None


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt that fits the context.

    Args:
        blocks: All blocks but the last, in prompt order.
        question_ids: Tokens of the last block, which attends to everything; at least one.
        attention: `Attention` value that is used, never unspecified.
        truncated_tokens: Tokens that truncation took away.
        dropped_documents: Indexes of the documents that it took away, ascending.
    """

    blocks: tuple[PlannedBlock, ...]
    question_ids: tuple[int, ...]
    attention: int
    truncated_tokens: int
    dropped_documents: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt after truncation."""
        return sum(len(block.token_ids) for block in self.blocks) + len(self.question_ids)
