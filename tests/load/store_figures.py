"""`make bench-store`: what encoding once and keeping is worth, each figure against another of the same run.

    python -m tests.load.store_figures --questions hotpotqa-100.jsonl

1. Encoding the passages beside transformers' own forward: tokens per second, memory.
2. A restart with the disk tier: blocks encoded, and the first token beside the first token of a cold server.
3. A cold prompt of 20 passages of 400 tokens beside one full-attention prefill of the same 8,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drystone
from drystone.local.gate_prompts import read_prompts
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor
from gateway.prompt.templates import passage_text
from gateway.prompt.tokenizer import PromptTokenizer
from shared.model import catalog
from tests.load.bf16_model import bf16_folder
from tests.load.goals import Goal
from tests.load.store_encoding import side_by_side

PASSAGES, PASSAGE_TOKENS = 20, 400
RAM_BYTES = 256 << 20
_MOST_READ = 1000


def main() -> int:
    """Measures, prints figures and goals; 1 when a goal was missed."""
    options = _options()
    model = bf16_folder(catalog.resolve_model(options.model, _tell), _tell)
    rows = read_prompts(options.questions, _MOST_READ)
    tokenizer = PromptTokenizer(model)
    figures: dict[str, Any] = {"threads": options.threads}
    goals: list[Goal] = []
    if "encode" in options.parts:
        texts = dict.fromkeys(passage_text(each.title, str(each.text)) for row in rows for each in row.documents)
        ids = [tokenizer.encode(text, allow_special=False) for text in list(texts)[: options.passages]]
        ours, theirs = side_by_side(model, ids, options.threads, RAM_BYTES, _tell)
        figures |= {
            "passages": len(ids),
            "passage_tokens": ours.tokens,
            "tokens_per_second": ours.rate,
            "transformers_tokens_per_second": theirs.rate,
            "memory_above_mib": ours.memory_mib,
        }
        goals += [
            Goal("encoding, tokens per second / transformers' forward", ours.rate / theirs.rate, 1.1, ">="),
            Goal("memory above process and RAM budget, MiB", ours.memory_mib, 512.0, "<="),
        ]
    if "restart" in options.parts:
        questions = [row for row in rows if len(row.documents) >= options.documents][: options.questions_asked]
        figures |= (told := restart(model, questions, options.threads))
        goals += [
            Goal("blocks encoded after the restart", float(told["encoded_after_restart"]), 0.0, "<="),
            Goal("TTFT from disk / TTFT of encoding", told["ttft_disk_ms"] / told["ttft_cold_ms"], 1 / 5, "<="),
        ]
    if "long" in options.parts:
        figures |= (told := long_prompt(model, tokenizer, rows, options.threads, options.rounds))
        share = told["ttft_full_ms"] / told["ttft_block_ms"] / told["counted_ratio"]
        goals.append(Goal("full / block, share of the ratio counted in operations", share, 0.8, ">="))
    _print(figures, goals, as_json=options.json)
    return int(any(goal.met is False for goal in goals))


def restart(model: Path, rows: Sequence[Any], threads: int) -> dict[str, Any]:
    """Warms the questions' passages, starts everything anew, and asks; then asks a server that has nothing."""
    with tempfile.TemporaryDirectory(prefix="drystone-bench-") as folder:
        store = Path(folder)
        with _served(model, threads, store) as server, drystone.Client(server.address) as client:
            documents = [document for row in rows for document in row.documents]
            client.warm(documents).result()
        with _served(model, threads, store) as server, drystone.Client(server.address) as client:
            warm = [_ask(client, row) for row in rows]
    with _served(model, threads, None) as server, drystone.Client(server.address) as client:
        cold = [_ask(client, row) for row in rows]
    sources = sorted({str(block.source) for answer in warm for block in answer.blocks if block.key})
    same = all(one.token_ids == other.token_ids for one, other in zip(warm, cold, strict=True))
    return {
        "questions": len(rows),
        "ttft_disk_ms": statistics.median(answer.timings.ttft_ms for answer in warm),
        "ttft_cold_ms": statistics.median(answer.timings.ttft_ms for answer in cold),
        "encoded_after_restart": sum(answer.usage.blocks_encoded for answer in warm),
        "sources_after_restart": sources,
        "same_tokens": same,
    }


def long_prompt(
    model: Path, tokenizer: PromptTokenizer, rows: Sequence[Any], threads: int, rounds: int
) -> dict[str, Any]:
    """Cold prompts of 8,000 tokens, block and full, in turns; no text is used twice."""
    from prefill_worker.tiers.cost import EncodeCost
    from shared.engine import served_model

    cost = EncodeCost.of(served_model.load(model, name="counted", dtype="bfloat16"))
    texts = _texts_of(tokenizer, rows, 2 * rounds * PASSAGES)
    block, full = list[float](), list[float]()
    with _served(model, threads, None) as server, drystone.Client(server.address) as client:
        for number in range(2 * rounds):
            passages = texts[number * PASSAGES : (number + 1) * PASSAGES]
            attention = "full" if number % 2 else "block"
            answer = client.generate(blocks=[*passages, "Why?"], attention=attention, max_new_tokens=1, timeout=600)
            (full if number % 2 else block).append(answer.timings.ttft_ms)
            _tell(f"{attention} attention over {answer.usage.prompt_tokens} tokens: {answer.timings.ttft_ms:.0f} ms")
    whole = PASSAGES * PASSAGE_TOKENS
    return {
        "ttft_block_ms": statistics.median(block),
        "ttft_full_ms": statistics.median(full),
        "measured_ratio": statistics.median(full) / statistics.median(block),
        "counted_ratio": cost(whole) / (PASSAGES * cost(PASSAGE_TOKENS)),
    }


def _texts_of(tokenizer: PromptTokenizer, rows: Sequence[Any], count: int) -> list[str]:
    """Texts of 400 tokens each, cut out of the questions' passages."""
    words = " ".join(str(document.text) for row in rows for document in row.documents).split()
    texts, at = list[str](), 0
    while len(texts) < count:
        taken = 150
        while len(tokenizer.encode(" ".join(words[at : at + taken]), allow_special=False)) < PASSAGE_TOKENS:
            taken += 1
        texts.append(" ".join(words[at : at + taken]))
        at += taken
        if at + 2 * PASSAGE_TOKENS > len(words):
            at = at % 97 + 1  # another cut of the same words is another block
    return texts


def _ask(client: drystone.Client, row: Any) -> drystone.Answer:
    return client.generate(row.question, documents=row.documents, max_new_tokens=8)


def _served(model: Path, threads: int, store: Path | None) -> Supervisor:
    options = ServeOptions(model=str(model), dtype="bfloat16", port=0, threads=threads, log_level="error", store=store)
    return Supervisor(options, report=lambda _: None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON Lines of question and documents")
    parser.add_argument("--model", default="default", help="folder, hub id or 'default'")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--passages", type=int, default=994, help="passages to encode")
    parser.add_argument("--questions-asked", type=int, default=10, help="questions after the restart")
    parser.add_argument("--documents", type=int, default=10, help="least passages of such a question")
    parser.add_argument("--rounds", type=int, default=2, help="long prompts of each kind")
    parser.add_argument("--parts", nargs="+", default=["encode", "restart", "long"], help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _print(figures: dict[str, Any], goals: Sequence[Goal], *, as_json: bool) -> None:
    if as_json:
        met = {goal.text: {"ratio": goal.ratio, "bound": goal.bound, "met": goal.met} for goal in goals}
        print(json.dumps({"figures": figures, "goals": met}))
        return
    for name, value in figures.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'} {goal.text}: {goal.ratio:.3f} ({goal.must} {goal.bound:.3g})")


def _tell(said: str) -> None:
    print(f"bench-store: {said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
