"""How much memory KV may take: what is set, or a share of what is free."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_MEMINFO = Path("/proc/meminfo")


def pool_bytes(set_bytes: int | None, share: float, device: torch.device) -> int:
    """Bytes of the pool.

    Args:
        set_bytes: What the operator set; None takes `share` of what is free once the model is loaded.
        share: In (0, 1].
        device: Where the pool will lie.

    Raises:
        ValueError: The free memory cannot be found out.
    """
    if set_bytes is not None:
        return set_bytes
    return int(free_bytes(device) * share)


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation on `device` may take: on a CPU the least of the machine's and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    limits = [_available(_MEMINFO), *(_left(*names) for names in _CGROUPS)]
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ValueError("pool_bytes: the free memory of this machine cannot be found out; set it")
    return min(known)


def _available(meminfo: Path) -> int | None:
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left(folder: Path, limit: str, usage: str) -> int | None:
    """What a container may still take; None where there is no limit.

    Its usage counts pages of files too, such as the model's own; the system takes those back when they are wanted.
    """
    if not (folder / limit).exists() or not (folder / usage).exists():
        return None
    most = (folder / limit).read_text().strip()
    if most == "max":
        return None
    stat = folder / "memory.stat"
    lines = [line.split() for line in stat.read_text().splitlines()] if stat.exists() else []
    files = sum(int(value) for name, value in lines if name in ("active_file", "inactive_file"))
    return max(0, int(most) - max(0, int((folder / usage).read_text()) - files))
