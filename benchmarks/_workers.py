# SPDX-License-Identifier: Apache-2.0
"""Worker processes for interleaved comparisons, each optionally held to a memory limit."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def drop_page_cache() -> bool:
    """Empties the page cache (needs root); False when it cannot."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def touch_memory(nbytes: int) -> None:
    """Fills and frees `nbytes` and a quarter more, in huge pages as a load takes them: memory that
    the host of a virtual machine has taken back is slow at its first touch, which shall not be the
    measurement's.
    """
    if not nbytes:
        return
    with mmap.mmap(-1, nbytes + nbytes // 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1


class MemoryLimit:
    """A memory cgroup (version 1 or 2), page cache included, for processes that enter it."""

    def __init__(self, nbytes: int) -> None:
        v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        legacy = v1.is_dir()
        self.folder = (v1 if legacy else v2) / f"distorch-benchmark-{os.getpid()}-{id(self)}"
        self.folder.mkdir()
        limit = "memory.limit_in_bytes" if legacy else "memory.max"
        (self.folder / limit).write_text(str(nbytes))
        self._peak = "memory.max_usage_in_bytes" if legacy else "memory.peak"

    def enter(self) -> None:
        """Moves the calling process into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """Highest use so far, in bytes."""
        try:
            return int((self.folder / self._peak).read_text())
        except OSError:
            return -1

    def close(self) -> None:
        """Removes the group; its processes must have ended."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class Worker:
    """A child process that prints a JSON line for each line it is sent."""

    def __init__(self, script: str, arguments: list[str], limit: MemoryLimit | None = None) -> None:
        self.limit = limit
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=limit.enter if limit else None,  # noqa: PLW1509 - one thread here
        )
        self.ready = self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **question: object) -> dict:
        """One question, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process and its memory group."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        if self.limit:
            self.limit.close()


def questions() -> Iterator[dict]:
    """In a worker: what it is asked, until the other side closes."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(**values: object) -> None:
    """In a worker: one JSON line."""
    print(json.dumps(values), flush=True)
