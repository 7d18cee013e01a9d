"""What it costs to encode a block again, counted in operations; a tier weighs it against bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # It brings torch, which tiers and their tools do without.
    from shared.engine.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class EncodeCost:
    """Operations to encode a block of n tokens: n · (linear + attention · n).

    Attributes:
        linear_flops_per_token: Of the matrix products, in which tokens do not meet.
        attention_flops_per_token_pair: Of attention, per pair of any two tokens of the block: causality halves it.
    """

    linear_flops_per_token: float
    attention_flops_per_token_pair: float

    def __call__(self, tokens: int) -> float:
        """Operations."""
        return tokens * (self.linear_flops_per_token + self.attention_flops_per_token_pair * tokens)

    @classmethod
    def of(cls, model: ServedModel) -> EncodeCost:
        """Figures of a loaded model. Windows and resting experts are left out: the order of blocks needs neither."""
        module, geometry = model.module, model.geometry
        ends = (module.get_input_embeddings(), module.get_output_embeddings())
        unused = {id(weight) for end in ends if end is not None for weight in end.parameters()}
        weights = sum(weight.numel() for weight in module.parameters() if id(weight) not in unused)
        # A product with K and one with V, each a multiplication and an addition, over half of the square.
        pair = 2 * 2 * geometry.heads * geometry.shape.head_dim * geometry.shape.layers / 2
        return cls(2.0 * weights, pair)
