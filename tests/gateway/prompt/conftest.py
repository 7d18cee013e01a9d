"""Small real tokenizers: byte-level BPE, each with the chat template of a family of models."""

from pathlib import Path

import pytest
from prompt_templates import CHATML, LLAMA3, NO_SYSTEM, MakePlanner, MakeTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gateway.prompt import PromptLimits, PromptPlanner, PromptTokenizer, TemplateDefaults

_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
# Added but not special, as in Qwen3; the white space run is ordinary text, as in GPT-NeoX.
_ADDED = ("<think>", "</think>", "        ")
_LINES = (
    "You are an intelligent AI assistant. Please answer questions based on the user's instructions.",
    "- Title: Dry stone\nA wall holds without mortar: each stone is cut once and fits wherever it is laid.\n",
    "Please write a high-quality answer for the given question using only the provided search documents",
    "Question: what holds a wall? system user assistant [Block-Attention]",
)


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Builds a tokenizer folder and loads it."""

    def make(chat_template: str | None, *, bos: str | None = None, adds_bos: bool = False) -> PromptTokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        _save(folder, chat_template, bos, adds_bos=adds_bos)
        return PromptTokenizer(folder)

    return make


def _save(folder: Path, chat_template: str | None, bos: str | None, *, adds_bos: bool) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_LINES, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in _ADDED])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    # Left over from training, as in many published tokenizers; prompts must not be cut by it.
    backend.enable_truncation(max_length=8)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|end_of_text|>")  # noqa: S106
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PromptTokenizer:
    return make_tokenizer(CHATML)


@pytest.fixture(scope="session")
def llama3(make_tokenizer: MakeTokenizer) -> PromptTokenizer:
    return make_tokenizer(LLAMA3, bos="<|begin_of_text|>", adds_bos=True)


@pytest.fixture(scope="session")
def no_system(make_tokenizer: MakeTokenizer) -> PromptTokenizer:
    return make_tokenizer(NO_SYSTEM, bos="<|begin_of_text|>", adds_bos=True)


@pytest.fixture(scope="session")
def base(make_tokenizer: MakeTokenizer) -> PromptTokenizer:
    return make_tokenizer(None, bos="<|begin_of_text|>", adds_bos=True)


@pytest.fixture(scope="session")
def make_planner() -> MakePlanner:
    def make(
        tokenizer: PromptTokenizer,
        *,
        context_tokens: int = 100_000,
        limits: PromptLimits | None = None,
        **defaults: object,
    ) -> PromptPlanner:
        return PromptPlanner(
            tokenizer,
            context_tokens=context_tokens,
            limits=limits or PromptLimits(),
            defaults=TemplateDefaults(**defaults),  # type: ignore[arg-type] # of the right kind, or wrong on purpose
        )

    return make
