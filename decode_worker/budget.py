"""How much memory KV may take: what is set, or a share of what is free."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
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
    limits = [_available(_MEMINFO), *(_left(limit, used) for limit, used in _CGROUP_LIMITS)]
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


def _left(limit: Path, used: Path) -> int | None:
    """What a container may still take; None where there is no limit."""
    if not (limit.exists() and used.exists()):
        return None
    most = limit.read_text().strip()
    return None if most == "max" else max(0, int(most) - int(used.read_text()))
