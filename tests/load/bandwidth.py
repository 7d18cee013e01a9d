"""Memory bandwidth of one core, and the least time that a decode step can take with it.

A decode step of one stream reads every weight once and the KV of its whole context once. No engine can be faster than
those bytes over the bandwidth, whatever it computes.

    taskset -c 0 python -m tests.load.bandwidth
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Eight times the last-level cache of the machines that were tried: a pass leaves nothing of itself there.
BYTES: Final = 256 << 20
_PASSES: Final = 12


def read_rate() -> float:
    """Bytes a second that one thread reads from memory: the best of several passes of a float32 sum.

    The best, for the floor is what the machine can do: a pass that others slowed would flatter the engine.
    """
    import torch

    torch.set_num_threads(1)
    values = torch.ones(BYTES // 4)
    rates = []
    for _ in range(_PASSES):
        began = time.perf_counter()
        values.sum()
        rates.append(BYTES / (time.perf_counter() - began))
    return max(rates[1:])


def read_rate_of(core: int) -> float:
    """The same on one core, in a process of its own, so that this one's threads stay where they are."""
    command = ["taskset", "-c", str(core), sys.executable, "-m", "tests.load.bandwidth"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a decode step of one stream.

    Args:
        weight_bytes: Bytes of the weights that a step reads.
        kv_bytes_per_token: Bytes of KV of one token.
        context_tokens: Tokens in the context.
        bytes_per_second: Memory bandwidth.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    context_tokens: float
    bytes_per_second: float

    @property
    def seconds(self) -> float:
        """Weights and KV over the bandwidth."""
        return (self.weight_bytes + self.kv_bytes_per_token * self.context_tokens) / self.bytes_per_second


def weight_bytes(model: Path) -> int:
    """Bytes of the tensors of a safetensors folder, by their headers. A tied head is stored, and read, once."""
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(end - start for start, end in offsets)
    return total


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of KV of one token in bfloat16: 2 (k, v) · layers · KV heads · head width · 2."""
    config = json.loads((model / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * heads * width * 2)


if __name__ == "__main__":
    print(read_rate())
