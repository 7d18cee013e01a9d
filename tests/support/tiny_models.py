"""Tiny random checkpoints of every kind the engine serves or refuses, with a real tokenizer.

Weights are drawn so that logits spread widely (ties are rare, text does not repeat one token) and attention is
sharp enough for documents to matter. A folder is the same, byte for byte, for the same kind and seed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VOCAB_SIZE = 400
MAX_POSITIONS = 8192
SLIDING_WINDOW = 48
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = SPECIAL_TOKENS
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "The harbour office opens at seven and the keeper of the lighthouse writes down the weather every evening. ",
    "Question: which passage names the answer? Answer: the one that the librarian read aloud in the old town hall. ",
    "A wall of dry stone stands without mortar; each stone is cut once and fits wherever it is laid. ",
    "system user assistant document documents title text preamble instructions 0 1 2 3 4 5 6 7 8 9 10 2024 ",
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}


def _rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-default": ("llama", {**_BASE, **_rope("default")}),
    "llama-llama3rope": (
        "llama",
        {
            **_BASE,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=1024,
            ),
        },
    ),
    "llama-linear": ("llama", {**_BASE, **_rope("linear", factor=4.0)}),
    "llama-yarn": ("llama", {**_BASE, **_rope("yarn", factor=4.0, original_max_position_embeddings=2048)}),
    "llama-mha-untied": (
        "llama",
        {**_BASE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, **_rope("default")},
    ),
    "llama-gqa-tied": (
        "llama",
        {
            **_BASE,
            "hidden_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            **_rope("default"),
        },
    ),
    "qwen2": ("qwen2", {key: value for key, value in {**_BASE, **_rope("default")}.items() if key != "head_dim"}),
    "qwen3": ("qwen3", {**_BASE, "head_dim": 32, **_rope("default")}),
    "qwen3-mixed-window": (
        "qwen3",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            **_rope("default"),
        },
    ),
    "mistral": ("mistral", {**_BASE, "sliding_window": None, **_rope("default")}),
    "mistral-sliding": ("mistral", {**_BASE, "sliding_window": SLIDING_WINDOW, **_rope("default")}),
    "llama-dynamic-ntk": (
        "llama",
        {**_BASE, "max_position_embeddings": 64, **_rope("dynamic", factor=8.0)},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**_BASE, **_rope("default")}),
}

KINDS_REFUSED = ("llama-dynamic-ntk", "gpt2", "hunyuan_v1_dense")
KINDS_SERVED = tuple(kind for kind in _KINDS if kind not in KINDS_REFUSED)


def make_tiny(kind: str, folder: Path, seed: int = 0, eos_scale: float = 0.3) -> Path:
    """Saves a tiny random checkpoint that any Hugging Face loader reads.

    Args:
        kind: One of `KINDS_SERVED` or `KINDS_REFUSED`.
        folder: Where to save; made when absent.
        seed: Seed of the weights.
        eos_scale: Factor on the output row of `<|im_end|>`: below 1 an answer hardly ever ends by itself, at 2 most
            end within some ten tokens.

    Returns:
        `folder`, with float32 safetensors, config, generation config and tokenizer.
    """
    model_type, values = _KINDS[kind]
    tokenizer = tiny_tokenizer()
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(model_type, **values, **tokens)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= eos_scale
    model.generation_config = GenerationConfig(**tokens)
    with _without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens with ChatML special tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        pad_token=EOS_TOKEN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _draw_weights(model: Any, seed: int) -> None:
    """Redraws every parameter: unit-variance projections, sharp queries and keys, uneven norms, wide logits."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(drawn * 0.2 if name.endswith("bias") else 1 + drawn * 0.2)
            elif "lm_head" in name or (tied and name.endswith(("embed_tokens.weight", "wte.weight"))):
                parameter.copy_(drawn * 3 / parameter.shape[1] ** 0.5)
            elif "emb" in name or "wte" in name or "wpe" in name:
                parameter.copy_(drawn * 0.5)
            else:
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(drawn * gain / parameter.shape[1] ** 0.5)
