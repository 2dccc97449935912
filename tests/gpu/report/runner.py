# SPDX-License-Identifier: Apache-2.0
"""One subprocess: its own session, a timeout, stacks at the timeout, a capped log."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import stacks
from .processes import Child

GRACE_S = 12.0  # for stacks, after a timeout


@dataclasses.dataclass
class Ended:
    """How a process ended. `status` is None where it could not be ended."""

    status: int | None
    timed_out: bool
    seconds: float
    log: str
    stacks: str
    notes: list[str]

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.timed_out

    @property
    def crashed(self) -> bool:
        return self.status is not None and self.status < 0 and not self.timed_out

    @property
    def how(self) -> str:
        if self.timed_out:
            return f"timed out after {self.seconds:.0f} s"
        return told(self.status)


def told(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "could not be ended"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"


@dataclasses.dataclass(frozen=True)
class Watched:
    """A file that a process replaces as it goes on. One that does not for so long hangs."""

    path: Path
    seconds: float

    def left(self, start: float) -> float:
        """Seconds until it counts as hanging."""
        since = time.monotonic() - start
        with contextlib.suppress(OSError):
            since = min(since, max(0.0, time.time() - self.path.stat().st_mtime))
        return self.seconds - since


def run(
    command: Sequence[str], *, limit: float, cwd: Path, env: Mapping[str, str], scratch: Path,
    grace: float = GRACE_S, watched: Watched | None = None,
) -> Ended:  # fmt: skip
    """Runs a command for at most `limit` seconds, then for `grace` to take its stacks."""
    start = time.monotonic()
    child = Child(command, cwd=cwd, env=env, scratch=scratch)
    told_stacks, timed_out = "", False
    try:
        while child.running():
            left = start + limit - time.monotonic()
            if watched is not None:
                left = min(left, watched.left(start))
            if left <= 0:
                timed_out = True
                told_stacks = stacks.taken(child, grace)
                break
            child.read(min(left, 0.05))
        child.read()
    finally:
        child.end()
    return Ended(
        child.process.poll(), timed_out, time.monotonic() - start, child.log.text(),
        told_stacks or child.stacks(), child.notes,
    )  # fmt: skip
