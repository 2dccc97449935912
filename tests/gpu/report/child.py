# SPDX-License-Identifier: Apache-2.0
"""Runs a module or a file so that its Python stacks can be had: `child -m MODULE ...`, `child FILE ...`.

SIGUSR1 and crashes write all threads' stacks to a file that the report names; it reads them there,
because the log may be flooded or captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

STACKS = "DISTORCH_REPORT_STACKS"  # a path; each process appends its number
PARENT = "DISTORCH_REPORT_PARENT"  # the report's process
# What workers are told (worker.py).
CHANNEL = "DISTORCH_REPORT_CHANNEL"  # two descriptors: where ids come from, where lines go to
DEVICE = "DISTORCH_REPORT_DEVICE"
_PR_SET_PDEATHSIG, _PR_SET_PTRACER = 1, 0x59616D61


def watch() -> None:
    """Makes this process tell its stacks, and end with the report."""
    path = os.environ.get(STACKS)
    if path is None:
        return
    stream = Path(f"{path}.{os.getpid()}").open("a")  # noqa: SIM115 - for the life of the process
    faulthandler.enable(stream, all_threads=True)
    faulthandler.register(signal.SIGUSR1, stream, all_threads=True, chain=False)
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl
        # A debugger is no parent of this process: Yama forbids it to attach, unless told.
        prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
        if os.environ.get(PARENT) == str(os.getppid()):
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    watch()
    module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2:] if module else sys.argv[1:]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
