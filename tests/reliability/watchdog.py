# SPDX-License-Identifier: Apache-2.0
"""Runs a program of Python in a process of its own, and says where it stands if it stands still."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PATIENCE = 180.0  # seconds without output; distorch itself waits a minute for other threads
_GDB_SECONDS = 120


class StoppedError(AssertionError):
    """The program crashed, failed, or stood still. Its text has what the program said last."""


def run(
    arguments: Sequence[str],
    *,
    patience: float = PATIENCE,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    before: Sequence[str] = (),
    told: Callable[[str], None] = lambda text: None,
) -> str:
    """Runs `python *arguments` and returns all its output. It has to print something now and then.

    Args:
        arguments: What follows the name of the interpreter.
        before: A command that starts the interpreter, such as ["setarch", "-R"].
        folder: Where it runs.
        patience: Seconds without output after which it is asked for its stacks and ended.
        env: Variables for its environment, besides those of this process.
        told: Is called with output as it comes.

    Raises:
        StoppedError: It ended with another status than 0, or stood still. Then the text also has the
            stacks of all threads: of Python, and of C++ where gdb is installed.
    """
    # With faulthandler, a crash and SIGABRT print the stack of every thread of Python.
    child = subprocess.Popen(
        [*before, sys.executable, "-X", "faulthandler", *arguments], cwd=folder,
        env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said: list[str] = []
    try:
        while text := _output(child, patience):
            said.append(text)
            told(text)
        status = child.wait(patience)
    except (TimeoutError, subprocess.TimeoutExpired):
        native = _native_stacks(child.pid)
        child.send_signal(signal.SIGABRT)
        said.append(child.communicate(timeout=_GDB_SECONDS)[0].decode(errors="replace"))
        text = f"nothing was printed for {patience:.0f} s"
        raise StoppedError(f"{text}:\n{''.join(said)[-20_000:]}\n{native}") from None
    finally:
        child.kill()
        child.wait()
    if status != 0:
        raise StoppedError(f"it ended with {status}:\n{''.join(said)[-20_000:]}")
    return "".join(said)


def _output(child: subprocess.Popen[bytes], patience: float) -> str:
    """What it prints next; empty when it has closed its output."""
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], patience)
    if not ready:
        raise TimeoutError
    return os.read(child.stdout.fileno(), 1 << 16).decode(errors="replace")


def status_of_child(child: int, patience: float) -> int:
    """Waits for a forked child to end. StoppedError, with its stacks, if it does not."""
    end = time.monotonic() + patience
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            stacks = _native_stacks(child)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise StoppedError(f"the forked child stands still:\n{stacks}")
        time.sleep(0.001)
    return ended[1]


def _native_stacks(process: int) -> str:
    """The stacks of C++, of every thread."""
    if shutil.which("gdb") is None:
        return "(no stacks of C++: gdb is not installed)"
    try:
        done = subprocess.run(
            ["gdb", "-p", str(process), "-batch", "-ex", "thread apply all bt 40"],
            capture_output=True, text=True, timeout=_GDB_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"(no stacks of C++: gdb took more than {_GDB_SECONDS} s)"
    return done.stdout
