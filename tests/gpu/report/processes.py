# SPDX-License-Identifier: Apache-2.0
"""A process in a session of its own, with everything it starts (Linux)."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import child as bootstrap
from .logs import CappedLog

MARK = "DISTORCH_REPORT_RUN"  # in the environment of every process that a run starts
_CHUNK = 1 << 16  # bytes
_AT_ONCE = 64  # chunks that are read before somebody else's turn
_KILL_S = 5.0  # after that a process is given up: the driver may hold it for ever
_FRAMES = ("/pluggy/", "/_pytest/", "/pytest/__main__.py", "<frozen runpy>", "gpu/report/child.py")
_numbers = itertools.count()
_alive: set[Child] = set()
_stopping = threading.Event()


class Child:
    """One run of a command. Its output is read with `read`, and it must be `end`ed."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], scratch: Path,
        pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if _stopping.is_set():
            raise RuntimeError("the report was stopped")
        self.name = f"{os.getpid()}-{next(_numbers)}"
        self.log = CappedLog()
        self.notes: list[str] = []
        self._stacks = scratch / f"stacks-{self.name}"
        own = {MARK: self.name, bootstrap.STACKS: str(self._stacks),
               bootstrap.PARENT: str(os.getpid())}  # fmt: skip
        self.process = subprocess.Popen(
            list(command), cwd=cwd, env={**env, **own}, pass_fds=pass_fds, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        self.at_end = False  # of its output
        os.set_blocking(self.output, False)
        _alive.add(self)

    def running(self) -> bool:
        return self.process.poll() is None

    def read(self, wait: float = 0.0) -> None:
        """Takes what the process has written; waits so many seconds for the first of it."""
        if self.at_end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait)
            return
        select.select([self.output], [], [], wait)
        for _ in range(_AT_ONCE):
            try:
                data = os.read(self.output, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self.at_end = True
                return
            self.log.add(data)

    def family(self) -> list[int]:
        """Its processes that are alive: those of the session, and those that carry its mark."""
        mark = f"{MARK}={self.name}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError, IndexError):
                state, _, _, session = _status(entry)
                mine = session == self.process.pid
                if state not in "ZX" and (mine or mark in _environment(entry)):
                    found.append(int(entry.name))
        return found

    def stacks(self) -> str:
        """What its processes have told of their Python stacks so far."""
        found = []
        for path in sorted(self._stacks.parent.glob(f"{self._stacks.name}.*")):
            text = path.read_text(errors="replace")
            if text:
                found.append(f"process {path.suffix[1:]}:\n{_ours(text)}")
        return "\n".join(found)

    def end(self, patience: float = 2.0) -> None:
        """Ends all of its processes: asked first, for so many seconds; then killed."""
        try:
            self._end(patience)
        finally:
            _alive.discard(self)
            assert self.process.stdout is not None
            self.process.stdout.close()

    def _end(self, patience: float) -> None:
        if not self.running():
            left = self.family()
            if left:
                self.notes.append(f"{len(left)} processes were left behind and were killed")
            patience = 0.0
        if patience > 0 and self._signalled(signal.SIGTERM, patience):
            return
        if not self._signalled(signal.SIGKILL, _KILL_S):
            self.notes.append(f"processes {self.family()} could not be ended")

    def _signalled(self, number: signal.Signals, seconds: float) -> bool:
        """Sends a signal to all; whether they are gone in time."""
        for pid in self.family():
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        until = time.monotonic() + seconds
        while self.running() or self.family():
            if time.monotonic() > until:
                return False
            self.read(0.02)
        with contextlib.suppress(OSError, ValueError):
            self.read()
        return True


def _ours(stacks: str) -> str:
    """Without the frames of pytest and runpy, which are the same in every stack."""
    lines = stacks.splitlines()
    return "\n".join(line for line in lines if not any(word in line for word in _FRAMES))


def _status(entry: Path) -> list:
    """State, parent, group and session of a process."""
    fields = (entry / "stat").read_text().rpartition(")")[2].split()
    return [fields[0], *map(int, fields[1:4])]


def _environment(entry: Path) -> list[bytes]:
    return (entry / "environ").read_bytes().split(b"\0")


def end_all() -> None:
    """Kills whatever still runs, and lets nothing start: the report itself was told to stop."""
    _stopping.set()
    for child in list(_alive):
        for pid in child.family():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
