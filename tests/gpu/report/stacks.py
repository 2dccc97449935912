# SPDX-License-Identifier: Apache-2.0
"""Where the threads of a hanging process are: in Python, and in C where there is a debugger."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from .logs import middle_out
from .processes import Child
from .tools import where

_PYTHON_S, _GDB_S = 2.0, 10.0
_MOST_GDB = 2  # processes
_MOST_BYTES = 200 << 10


def taken(child: Child, limit: float) -> str:
    """Its stacks, within about `limit` seconds."""
    until = time.monotonic() + limit
    listening = [pid for pid in child.family() if _catches(pid, signal.SIGUSR1)]
    for pid in listening:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR1)
    if listening:
        _wait_for_stacks(child, min(_PYTHON_S, limit))
    found = [child.stacks()]
    debugger = where("cuda-gdb") or where("gdb")
    for pid in listening[:_MOST_GDB] if debugger else []:
        left = min(_GDB_S, until - time.monotonic())
        if left > 1:
            found.append(
                f"{Path(str(debugger)).name}, process {pid}:\n{_backtrace(str(debugger), pid, left)}"
            )
    return middle_out("\n".join(found), _MOST_BYTES)


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for the signal, which else would kill it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _wait_for_stacks(child: Child, limit: float) -> None:
    """Until something is written and no more comes."""
    until, before = time.monotonic() + limit, ""
    while time.monotonic() < until:
        child.read(0.02)
        time.sleep(0.2)
        now = child.stacks()
        if now and now == before:
            return
        before = now


def _backtrace(debugger: str, pid: int, limit: float) -> str:
    """Into a file, not a pipe: who holds a pipe open could stop the report."""
    command = [debugger, "-p", str(pid), "-batch", "-ex", "set pagination off",
               "-ex", "thread apply all bt"]  # fmt: skip
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        file.seek(0)
        return file.read().decode(errors="replace")
