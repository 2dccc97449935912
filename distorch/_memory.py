# SPDX-License-Identifier: Apache-2.0
"""How much RAM there is: of the machine, or of the control group that the process is in.

Containers, jobs of Slurm and units of systemd are such groups. The kernel ends a process that takes
more than its group may have, however much of the machine is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_MOUNT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Version:
    """The names of files in the folder of a group."""

    limits: tuple[str, ...]  # what it may never have; then where the kernel begins to slow it down
    usage: str
    cached: tuple[str, ...]  # in memory.stat: bytes of files, which the kernel gives up for others


_V1 = _Version(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)  # fmt: skip
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def host_memory() -> tuple[int, int]:
    """(total, free) bytes."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for folder, version in _groups():
        used = _number(folder / version.usage)
        limits = [_number(folder / name) for name in version.limits]
        for limit in limits:
            if limit is not None and used is not None and limit < memory.total:
                free = min(free, max(0, limit - used + _cached(folder, version)))
        if limits[0] is not None:
            total = min(total, limits[0])
    return total, free


def _groups() -> Iterator[tuple[Path, _Version]]:
    """The process's groups and all that they are in: each may have a limit of its own.

    In a container the path that the process is told may be the host's, or none. The mount itself is
    the container's group then.
    """
    yield from ((_MOUNT, _V2), (_MOUNT / "memory", _V1))
    for line in _text(_OWN).splitlines():
        _, kinds, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in kinds.split(","):
            mount, version = _MOUNT / "memory", _V1
        elif not kinds:
            mount, version = _MOUNT, _V2
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder == mount:
                break
            yield folder, version


def _cached(folder: Path, version: _Version) -> int:
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in version.cached)


def _number(file: Path) -> int | None:
    """None: the file is not there, or it says "max"."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return os.fsdecode(file.read_bytes())  # groups may have names that are no text
    except OSError:
        return ""
