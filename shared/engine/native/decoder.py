"""A model whose every layer runs in one call: its weights as they lie in memory, and what they were read from.

The structure is that of Llama and its kin: RMS norm, attention, residual, RMS norm, gated SiLU, residual; with biases
(Qwen2) or norms of queries and keys (Qwen3) where the model has them. Read from the module tree; whatever is not known
is refused, and whoever uses the result proves it against the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shared.engine.native.builder import NativeKernel
from shared.engine.rotation import Rotation, RotationKind
from shared.engine.served_model import ServedModel

# Names of a layer's parts, in the kernel's order (decoder.h: Layer). A bias or a norm may be missing.
_PARTS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.bias",
    "mlp.down_proj.bias",
)
_OPTIONAL = frozenset(part for part in _PARTS if part.endswith(".bias") or "q_norm" in part or "k_norm" in part)
_CHILDREN = {
    "": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
# Widths that a chunk of the kernel divides, in either type.
_CHUNK = 32
# Kernels' numbers of the bare rotations. A half turned backwards comes with its sines negated.
KINDS = {RotationKind.NONE: 0, RotationKind.HALF: 1, RotationKind.HALF_NEGATIVE: 1, RotationKind.INTERLEAVED: 2}


class UnfusedError(Exception):
    """The model is not of the structure that the fused decoder computes; says where it differs."""


@dataclass(frozen=True, slots=True)
class StepTables:
    """What a step reads and writes, for all layers: see step.h.

    Attributes:
        records: [slots, 2 * kv_heads * head_dim]; the rows' own KV is written there.
        slots: int64 [rows]: record of each row's own KV in layer 0.
        slot_step: Records from a slot to the same in the next layer.
        pieces: int64 [n, 6].
        rows: int64 [stacked].
        cosine: float32 [turned, rotary_dim].
        sine: float32 [turned, rotary_dim].
    """

    records: torch.Tensor
    slots: torch.Tensor
    slot_step: int
    pieces: torch.Tensor
    rows: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


@dataclass(frozen=True, slots=True)
class NativeDecoder:
    """Weights of a decoder, shared with the module that they were read from.

    Attributes:
        rotation: The bare rotation of every layer.
    """

    rotation: Rotation
    _kernel: NativeKernel
    _weights: list[torch.Tensor]
    _embeddings: torch.Tensor
    _norm: torch.Tensor
    _head: torch.Tensor
    _rotary: Any
    _float32: torch.Tensor
    _kv_heads: int
    _head_dim: int
    _epsilon: float
    _scale: float

    @classmethod
    def read(cls, model: ServedModel, kernel: NativeKernel) -> NativeDecoder:
        """The decoder of a loaded model.

        Raises:
            UnfusedError: The model is of another structure.
        """
        shape, module = model.geometry.shape, model.module
        if model.device.type != "cpu" or not kernel.takes(model.dtype, shape.head_dim):
            raise UnfusedError(f"no kernel for {shape.dtype} heads of {shape.head_dim} on {model.device}")
        rotation = _rotation(model)
        body = getattr(module, "model", None)
        head = getattr(module, "lm_head", None)
        if body is None or type(head) is not nn.Linear or head.bias is not None:
            raise UnfusedError("not a body with a plain language-model head")
        _check_tree(module, body)
        weights = [tensor for layer in body.layers for tensor in _layer(layer)]
        epsilons = {float(part.variance_epsilon) for part in body.modules() if _is_norm(part)}
        scales = {float(layer.self_attn.scaling) for layer in body.layers}
        if len(epsilons) != 1 or len(scales) != 1:
            raise UnfusedError(f"layers differ in epsilon {sorted(epsilons)} or scale {sorted(scales)}")
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping", "embedding_multiplier"):
            if getattr(module.config, name, None):
                raise UnfusedError(f"{name} is not computed")
        _check_tensors([*weights, body.embed_tokens.weight, body.norm.weight, head.weight], model.dtype)
        return cls(
            rotation,
            kernel,
            weights,
            body.embed_tokens.weight.detach(),
            body.norm.weight.detach(),
            head.weight.detach(),
            body.rotary_emb,
            torch.empty(0),
            shape.kv_heads,
            shape.head_dim,
            epsilons.pop(),
            scales.pop(),
        )

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor,
        step: StepTables,
        stops: Sequence[int] = (),
        done: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Runs rows through all layers and writes their KV.

        Args:
            token_ids: int64 [rows].
            positions: int64 [rows].
            keep: int64: rows whose logits are wanted; none stops after the last layer's KV.
            step: What the rows attend to.
            stops: Counts of layers, rising, below all; the rows' state is carried over them exactly.
            done: Called with each of them, when so many layers have the rows' KV.

        Returns:
            Logits float32 [len(keep), vocab].
        """
        # Tables in float32, whatever the model's type: rounded once less than the module's own.
        cosine, sine = self._rotary(self._float32, positions[None])
        layers = len(self._weights) // len(_PARTS)
        hidden = torch.empty(len(token_ids) if stops else 0, self._embeddings.shape[1], dtype=torch.float32)
        first, logits = 0, self._float32
        for last in (*stops, layers):
            logits = self._kernel.decoder_step(
                step.records,
                hidden,
                token_ids,
                keep,
                cosine[0],
                sine[0],
                step.slots,
                step.slot_step,
                step.pieces,
                step.rows,
                step.cosine,
                step.sine,
                KINDS[self.rotation.kind],
                self._weights,
                first,
                last,
                self._embeddings,
                self._norm,
                self._head,
                self._kv_heads,
                self._head_dim,
                self._epsilon,
                self._scale,
            )
            if last < layers and done is not None:
                done(last)
            first = last
        return logits


def _rotation(model: ServedModel) -> Rotation:
    rotations = {id(layer.rotation): layer.rotation for layer in model.geometry.layers}
    if len(rotations) != 1 or any(layer.window is not None for layer in model.geometry.layers):
        raise UnfusedError("layers have a window, or rotations of their own")
    [rotation] = rotations.values()
    if rotation.kind is not RotationKind.HALF:
        raise UnfusedError(f"rotation {rotation.kind.value}")
    return rotation


def _check_tree(module: nn.Module, body: Any) -> None:
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:  # noqa: SLF001 - torch has no public query
            raise UnfusedError(f"{name or 'the model'} has hooks")
    _only(body, _CHILDREN[""], "the body")
    for number, layer in enumerate(body.layers):
        _only(layer, _CHILDREN["layer"], f"layer {number}")
        for name in ("self_attn", "mlp"):
            _only(getattr(layer, name), _CHILDREN[name], f"layer {number}: {name}")
        parts = [*layer.self_attn.named_children(), *layer.mlp.named_children()]
        for name, part in parts:
            if name.endswith("_proj") and type(part) is not nn.Linear:
                raise UnfusedError(f"layer {number}: {name} is a {type(part).__name__}")
        # By name: torch's SiLU, and transformers' own of later versions.
        if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise UnfusedError(f"activation {type(layer.mlp.act_fn).__name__}")
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if not all(_is_norm(norm) for norm in norms):
            raise UnfusedError(f"layer {number}: {type(norms[0]).__name__} is no RMS norm")
    if type(body.embed_tokens) is not nn.Embedding or not _is_norm(body.norm):
        raise UnfusedError("embeddings or final norm are of another kind")


def _only(part: nn.Module, known: set[str], where: str) -> None:
    unknown = {name for name, _ in part.named_children()} - known
    if unknown:
        raise UnfusedError(f"{where} has {', '.join(sorted(unknown))}")


def _is_norm(part: Any) -> bool:
    return type(part).__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon")


def _layer(layer: nn.Module) -> Iterator[torch.Tensor]:
    tensors = dict(layer.named_parameters())
    unknown = tensors.keys() - set(_PARTS)
    if unknown:
        raise UnfusedError(f"a layer has {', '.join(sorted(unknown))}")
    for part in _PARTS:
        if part not in tensors and part not in _OPTIONAL:
            raise UnfusedError(f"a layer has no {part}")
        yield tensors[part].detach() if part in tensors else torch.empty(0)


def _check_tensors(tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.numel() and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise UnfusedError(f"a weight is {tensor.dtype} with strides {tensor.stride()}")
        if tensor.dim() > 1 and tensor.shape[-1] % _CHUNK:
            raise UnfusedError(f"a width of {tensor.shape[-1]} is no multiple of {_CHUNK}")
