# SPDX-License-Identifier: Apache-2.0
"""How much RAM there is: of the machine, or of the container if that may use less."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def host_memory() -> tuple[int, int]:
    """(total, free) bytes."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit_file, usage_file in _CGROUPS:
        try:
            limit, usage = Path(limit_file).read_text(), Path(usage_file).read_text()
        except OSError:
            continue
        if limit.strip().isdigit() and int(limit) < total:
            total, free = int(limit), min(free, max(0, int(limit) - int(usage)))
    return total, free
