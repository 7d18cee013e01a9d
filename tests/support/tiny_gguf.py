"""Small GGUF files, written the way llama.cpp's converter writes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from pathlib import Path

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_metadata_gguf(file: Path, metadata: dict[str, Any], rope_tensors: dict[str, list[float]]) -> Path:
    """A GGUF file with metadata and RoPE tensors only; enough for what decides about positions."""
    writer = GGUFWriter(file, "llama")
    _add_metadata(writer, metadata)
    for name, values in rope_tensors.items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    return _finish(writer, file)


def write_llama_gguf(source: Path, file: Path, metadata: dict[str, Any], *, vocabulary: bool = True) -> Path:
    """A GGUF file of a llama checkpoint with its byte-level tokenizer; `metadata` adds keys."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_metadata(writer, metadata)
    if vocabulary:
        _add_tokenizer(writer, source)
    weights = load_file(source / "model.safetensors")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if "lm_head.weight" in weights:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER_TENSORS.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in {"attn_q", "attn_k"}:
                weight = _interleaved(weight, heads if ours == "attn_q" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    return _finish(writer, file)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, hidden] from half-split to interleaved rotation pairs, as llama.cpp keeps them."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width).copy()


def _add_metadata(writer: GGUFWriter, metadata: dict[str, Any]) -> None:
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in metadata.items():
        adders[type(value)](key, value)


def _add_tokenizer(writer: GGUFWriter, source: Path) -> None:
    saved = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = saved["model"]["vocab"]
    special = {token["content"]: token["id"] for token in saved["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(special["<|im_start|>"])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_unk_token_id(special["<|endoftext|>"])
    writer.add_pad_token_id(special["<|im_end|>"])
    writer.add_chat_template((source / "chat_template.jinja").read_text(encoding="utf-8"))


def _finish(writer: GGUFWriter, file: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
