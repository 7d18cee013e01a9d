"""GGUF conversion: nothing about positions is lost, and a conversion is whole or absent."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.model import ModelError, gguf
from shared.model.catalog import DEFAULT, cache_dir, resolve_model
from shared.model.download import obtain_default_gguf
from shared.model.gguf import converted_folder, read_metadata
from shared.model.gguf_positions import rope_scaling
from tests.support.tiny_gguf import write_llama_gguf, write_metadata_gguf
from tests.support.tiny_models import EOS_TOKEN, make_tiny

if TYPE_CHECKING:
    from pathlib import Path

YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 2048,
}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {}),
        ({"llama.rope.freq_base": 500000.0, "llama.rope.scaling.type": "none"}, {}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}),
    ],
)
def test_scaling_that_a_config_can_say_is_read(
    tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]
) -> None:
    file = write_metadata_gguf(tmp_path / "m.gguf", metadata, {"rope_freqs.weight": [1.0, 1.0]})
    assert rope_scaling(*read_metadata(file)) == expected


@pytest.mark.parametrize(
    ("metadata", "tensors", "named"),
    [
        ({}, {"rope_freqs.weight": [1.0, 8.0]}, "rope_freqs.weight"),
        ({}, {"rope_factors_long.weight": [1.0, 1.0]}, "rope_factors_long.weight"),
        ({**YARN, "llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "llama.rope.scaling.yarn_log_multiplier"),
        ({**YARN, "llama.rope.scaling.attn_factor": 1.2}, {}, "llama.rope.scaling.attn_factor"),
        ({"llama.rope.scale_linear": 4.0}, {}, "llama.rope.scale_linear"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "longrope"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "yarn"),
        ({"llama.rope.scaling.factor": 4.0}, {}, "4.0"),
    ],
)
def test_scaling_that_would_be_lost_is_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, list[float]], named: str
) -> None:
    file = write_metadata_gguf(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(ModelError, match=named):
        rope_scaling(*read_metadata(file))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"not a model" * 10)
    with pytest.raises(ModelError, match="not a readable GGUF"):
        read_metadata(file)


@pytest.mark.parametrize(("kind", "metadata"), [("llama-yarn", YARN), ("llama-gqa-tied", {})])
def test_a_converted_model_computes_what_its_source_does(tmp_path: Path, kind: str, metadata: dict[str, Any]) -> None:
    source = make_tiny(kind, tmp_path / "source")
    file = write_llama_gguf(source, tmp_path / "tiny.gguf", metadata)
    said: list[str] = []
    folder = converted_folder(file, tmp_path / "models", "tiny", said.append)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert converted.config.tie_word_embeddings == original.config.tie_word_embeddings
    ids = torch.arange(3, 300)[None]
    with torch.inference_mode():
        difference = converted(ids).logits - original(ids).logits
    assert difference.abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == EOS_TOKEN
    assert converted.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    text = "The harbour, question: 12 日本?"
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(source).encode(text)
    assert converted_folder(file, tmp_path / "models", "tiny", said.append) == folder
    assert len(said) == 1


def test_a_window_that_the_config_would_not_have_is_refused(tmp_path: Path) -> None:
    source = make_tiny("llama-default", tmp_path / "source")
    file = write_llama_gguf(source, tmp_path / "tiny.gguf", {"llama.attention.sliding_window": 48})
    with pytest.raises(ModelError, match="sliding_window"):
        converted_folder(file, tmp_path / "models", "tiny", str)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"any")

    def half(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise ModelError("in the middle")

    monkeypatch.setattr(gguf, "convert", half)
    with pytest.raises(ModelError, match="in the middle"):
        converted_folder(file, tmp_path / "models", "m", str)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    monkeypatch.setattr(gguf, "convert", lambda _file, folder: (folder / "config.json").write_text("{}"))
    folder = converted_folder(file, tmp_path / "models", "m", str)
    assert json.loads((folder / gguf.MARKER).read_text(encoding="utf-8"))["source"] == "m.gguf"


def test_concurrent_converters_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"any")
    started, go, runs = threading.Event(), threading.Event(), []

    def slow(_: Path, folder: Path) -> None:
        runs.append(folder)
        started.set()
        assert go.wait(10)

    monkeypatch.setattr(gguf, "convert", slow)
    said: list[str] = []
    waiting = threading.Event()

    def announce(line: str) -> None:
        said.append(line)
        if line.startswith("waiting"):
            waiting.set()

    folders: list[Path] = []
    work = lambda: folders.append(converted_folder(file, tmp_path / "models", "m", announce))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    assert waiting.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(runs) == 1
    assert folders[0] == folders[1]


@pytest.mark.real_model
@pytest.mark.slow
def test_the_default_model_is_its_gguf_rounded_to_bfloat16() -> None:
    folder = resolve_model(DEFAULT, print)
    file = obtain_default_gguf(cache_dir() / "downloads", print)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(100, 200)[None]
    with torch.inference_mode():
        for weight in loaded.parameters():
            weight.copy_(weight.to(torch.bfloat16))
        assert torch.equal(loaded(ids).logits, converted(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == EOS_TOKEN
    assert converted.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert converted.config.tie_word_embeddings
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
