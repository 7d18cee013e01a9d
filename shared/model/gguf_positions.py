"""Positions in GGUF metadata: what transformers drops when it loads such a file.

Its loader maps `rope.freq_base` and nothing else of RoPE: a scaled model would load and answer wrongly, without an
exception. Scaling that a config can express is returned; anything else refuses the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.model import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_ROPE_KEYS_CARRIED = frozenset({"rope.freq_base", "rope.dimension_count"})
_SCALING_KEYS_KNOWN = frozenset(
    {
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)


def rope_scaling(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What config.rope_parameters must gain so that the model computes the positions its file asks for.

    Args:
        metadata: Values by key; keys of the architecture start with its name.
        tensors: The file's RoPE tensors by name.

    Returns:
        Empty without scaling, else rope_type and its parameters.

    Raises:
        ModelError: A scaling that has no equal in the config; nothing is dropped silently.
    """
    prefix = f"{metadata['general.architecture']}."
    rope = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(f"{prefix}rope.")}
    for name, tensor in tensors.items():
        if name != "rope_freqs.weight" or bool((tensor != 1).any()):
            raise ModelError(
                f"This GGUF file scales RoPE by the tensor {name} (Llama 3.1 and long-context Phi do), which no "
                "config can express exactly. Use the original safetensors checkpoint instead."
            )
    unknown = sorted(set(rope) - _ROPE_KEYS_CARRIED - _SCALING_KEYS_KNOWN)
    if unknown:
        raise ModelError(
            f"This GGUF file sets {', '.join(prefix + key for key in unknown)}, which would be lost in conversion. "
            "Use the original safetensors checkpoint instead."
        )
    kind = rope.get("rope.scaling.type", "none")
    factor = float(rope.get("rope.scaling.factor", 1.0))
    if kind == "none":
        if factor != 1.0:
            raise ModelError(f"This GGUF file gives a RoPE scaling factor {factor} without naming its type.")
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = rope.get("rope.scaling.original_context_length")
    if kind == "yarn" and original is not None:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    raise ModelError(
        f"This GGUF file scales RoPE by '{kind}' (original context: {original}); only linear, and yarn with its "
        "original context length, can be converted. Use the original safetensors checkpoint instead."
    )


def check_carried(config: Any, metadata: Mapping[str, Any]) -> None:
    """Compares a loaded config with the file's positions and windows.

    Args:
        config: transformers' config of the loaded file.
        metadata: Values by key; keys of the architecture start with its name.

    Raises:
        ModelError: The config would compute other positions or windows than the file asks for.
    """
    prefix = f"{metadata['general.architecture']}."
    parameters = config.rope_parameters or {}
    per_type = [parameters] if "rope_theta" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = {int(head_dim * p.get("partial_rotary_factor", 1.0)) for p in per_type}
    carried: dict[str, set[Any]] = {
        "rope.freq_base": {float(p["rope_theta"]) for p in per_type},
        "rope.dimension_count": rotated,
        "attention.sliding_window": {getattr(config, "sliding_window", None)},
    }
    for key, values in carried.items():
        given = metadata.get(prefix + key)
        if given is not None and given not in values:
            raise ModelError(
                f"This GGUF file says {prefix}{key} = {given}, but the converted config would say "
                f"{', '.join(map(str, values)) or 'nothing'}. Use the original safetensors checkpoint instead."
            )
