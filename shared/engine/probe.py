"""Proof at load that a model's blocks may be laid at any position (design §3).

Random tokens run at position 0 and at several distances; for every layer one rotation must turn the
queries and keys of the first run into those of the others, and values must not change at all. What
cannot be proved so is refused, naming the layer and why: learned positions, ALiBi, a norm with
weights after RoPE, dynamic-NTK or longrope across their regimes, attention that never reaches the seam.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.engine.partials import causal_partial
from shared.engine.rotation import Rotation, RotationKind
from shared.engine.seam import UnsupportedAttentionError
from shared.kv.layout import KvShape

_TOKENS = 16
_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Relative RMS error allowed between a rotated run and the run itself. bfloat16 rounds every
# activation on the way to a deep layer; a wrong rotation is off by about 1 in either type.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.05}


class ProbeError(Exception):
    """The model cannot be served with block attention; says which layer and why."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What one layer does with positions. `window` is in tokens of global distance."""

    rotation: Rotation
    window: int | None


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Proved facts of a loaded model."""

    shape: KvShape
    heads: int
    layers: tuple[LayerGeometry, ...]

    def rope_regime(self) -> bytes:
        """32-byte digest of every layer's rotation and window."""
        digest = hashlib.blake2b(digest_size=32)
        for layer in self.layers:
            digest.update(layer.rotation.digest())
            digest.update(str(layer.window).encode())
        return digest.digest()

    @property
    def windowed_layers(self) -> int:
        """Layers with a sliding window."""
        return sum(layer.window is not None for layer in self.layers)


@dataclass(slots=True)
class _Capture:
    """Attention context that keeps what each layer was given."""

    q: dict[int, torch.Tensor] = field(default_factory=dict)
    k: dict[int, torch.Tensor] = field(default_factory=dict)
    v: dict[int, torch.Tensor] = field(default_factory=dict)
    window: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        if layer in self.k:
            raise ProbeError(f"layer {layer}: attends more than once in a forward pass")
        self.q[layer], self.k[layer], self.v[layer], self.window[layer] = q[0], k[0], v[0], window
        out, _ = causal_partial(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), scale)
        return out.transpose(0, 1)[None].to(q.dtype)


@torch.inference_mode()
def probe(model: Any, *, dtype: str, context_tokens: int) -> ModelGeometry:
    """Runs the proof on a loaded causal language model; raises `ProbeError` when it fails."""
    config = model.config.get_text_config()
    _refuse_by_config(config)
    if context_tokens <= _TOKENS:
        raise ProbeError(f"a context of {context_tokens} tokens is too short to be proved; {_TOKENS + 1} is the least")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, _TOKENS), generator=generator).to(model.device)
    here = _run(model, ids, 0)
    layers = config.num_hidden_layers
    if sorted(here.k) != list(range(layers)):
        raise ProbeError(
            f"{len(here.k)} of {layers} layers reached the attention seam; the model attends by other means"
        )
    farthest = context_tokens - _TOKENS
    deltas = sorted({delta for delta in (1, 37, 500, farthest // 2, farthest) if 0 < delta <= farthest})
    rotations: dict[int, Rotation] = {}
    for delta in reversed(deltas):
        there = _run(model, ids, delta)
        for layer in range(layers):
            known = [rotations[layer]] if layer in rotations else None
            rotations[layer] = _prove_layer(model, here, there, layer, delta, _TOLERANCE[dtype], known)
    # Layers with equal rotations share one object: their angle tables are then made once a step.
    shared: dict[bytes, Rotation] = {}
    for layer, rotation in rotations.items():
        rotations[layer] = shared.setdefault(rotation.digest(), rotation)
    kv_heads, _, head_dim = here.k[0].shape
    for layer in range(layers):
        if here.k[layer].shape != here.k[0].shape or here.v[layer].shape != here.k[0].shape:
            raise ProbeError(f"layer {layer}: keys and values must have one shape in all layers")
    geometry = tuple(LayerGeometry(rotations[layer], here.window[layer]) for layer in range(layers))
    return ModelGeometry(KvShape(layers, kv_heads, head_dim, dtype), here.q[0].shape[0], geometry)


def _refuse_by_config(config: Any) -> None:
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise ProbeError(f"layer types {sorted(unknown)} are not supported; known: {sorted(_KNOWN_LAYER_TYPES)}")


def _run(model: Any, ids: torch.Tensor, start: int) -> _Capture:
    capture = _Capture()
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    try:
        model(ids, position_ids=positions, use_cache=False, logits_to_keep=1, drystone=capture)
    except UnsupportedAttentionError as error:
        raise ProbeError(str(error)) from error
    except (IndexError, TypeError, ValueError) as error:
        raise ProbeError(f"the model does not run at position {start}: {error}") from error
    return capture


def _prove_layer(
    model: Any,
    here: _Capture,
    there: _Capture,
    layer: int,
    delta: int,
    tolerance: float,
    known: list[Rotation] | None,
) -> Rotation:
    # float32 angles at far positions round in proportion to the distance.
    limit = tolerance + delta * 2e-7
    value_error = _distance(there.v[layer], here.v[layer])
    if value_error > limit:
        raise ProbeError(
            f"layer {layer}: values change by {value_error:.1e} when {_TOKENS} tokens move by {delta} positions, "
            "so a block's KV depends on where it lies (learned positions, ALiBi, or scaling that changes regime)"
        )
    moved = torch.tensor([delta], device=here.k[layer].device)
    best = float("inf")
    for rotation in known or _candidates(model, here.k[layer].shape[-1]):
        cos, sin = rotation.tables(moved)
        error = max(
            _distance(there.k[layer], rotation.apply(here.k[layer], cos, sin)),
            _distance(there.q[layer], rotation.apply(here.q[layer], cos, sin)),
        )
        if error <= limit:
            return rotation
        best = min(best, error)
    raise ProbeError(
        f"layer {layer}: no known rotation moves its queries and keys by {delta} positions "
        f"(best relative error {best:.1e}, limit {limit:.1e}); the model may norm or scale after RoPE"
    )


def _candidates(model: Any, head_dim: int) -> Iterator[Rotation]:
    # NONE last: a rotation that happens to be tiny must not pass for none at the farthest distance.
    seen: set[bytes] = set()
    for name, buffer in model.named_buffers():
        if "inv_freq" not in name or "original" in name or 2 * buffer.numel() > head_dim:
            continue
        frequencies = buffer.detach().to(torch.float32).clone()
        for kind in (RotationKind.HALF, RotationKind.INTERLEAVED, RotationKind.HALF_NEGATIVE):
            rotation = Rotation(kind, frequencies)
            if rotation.digest() not in seen:
                seen.add(rotation.digest())
                yield rotation
    yield Rotation(RotationKind.NONE, torch.zeros(0, device=model.device))


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.to(torch.float32), expected.to(torch.float32)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
