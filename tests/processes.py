# SPDX-License-Identifier: Apache-2.0
"""What the running process holds: donor files and threads (Linux)."""

import contextlib
from pathlib import Path

PROC = Path("/proc/self")


def _scratch_files() -> list[str]:
    """Open files that have a name of distorch's, or had none from the beginning (`/tmp/#123`)."""
    found = []
    for descriptor in (PROC / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime: the listing's own
            found.append(str(descriptor.readlink()))
    return [path for path in found if "distorch-" in path or "/#" in path]


_OF_OTHERS = frozenset(_scratch_files())  # of pytest, which keeps output in such files


def donor_files() -> list[str]:
    """Open scratch files of distorch."""
    return [path for path in _scratch_files() if path not in _OF_OTHERS]


def reader_threads() -> int:
    return sum(
        (task / "comm").read_text().startswith("distorch") for task in (PROC / "task").iterdir()
    )
