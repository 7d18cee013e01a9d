"""What a worker checks of blocks that a gateway names, before it touches memory for them."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef
from shared.kv.keys import KeySpace


def check_block(block: BlockRef, keys: KeySpace, vocabulary_size: int) -> None:
    """Raises unless the block's key is the key of its tokens: a wrong one would give another block's answer."""
    check_token_ids("block", block.token_ids, vocabulary_size)
    if keys.key(block.token_ids) != block.key:
        raise DrystoneError(Reason.INTERNAL, f"key {block.key.hex()[:80]} is not of the tokens that came with it")


def check_token_ids(what: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raises unless there are tokens and the model has embeddings for them all."""
    if not token_ids:
        raise DrystoneError(Reason.INTERNAL, f"a {what} without tokens")
    if max(token_ids) >= vocabulary_size:
        raise DrystoneError(
            Reason.INCOMPATIBLE_WORKERS,
            f"a {what} has token id {max(token_ids)} and the model has {vocabulary_size}; "
            "does the gateway use the model's own tokenizer?",
        )
