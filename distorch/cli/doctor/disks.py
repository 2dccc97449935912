# SPDX-License-Identifier: Apache-2.0
"""The folder of donor files: whether it can be used, is on a disk, has room, and how fast it is."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distorch import _native
from distorch.cli.doctor.findings import Check, tried
from distorch.cli.doctor.gpus import bits_check
from distorch.display.tables import human_bytes
from distorch.machine.links import measure_disk

_LOW_BYTES = 1 << 30
_SLOW = 0.3e9  # bytes per second: hard disks and most folders on a network are below
_USABLE = "the folder for donor files can be used"


def checks(folder: Path, accelerators: Sequence[str] = ()) -> list[Check]:
    """Tries the folder that DISTORCH_DISK names, or the one that was chosen without it."""
    elsewhere = _elsewhere()
    if problem := _unusable(folder):
        if os.path.lexists(folder):
            return [Check(_USABLE, "NO", problem, **elsewhere)]
        command = f"mkdir -p {_quoted(folder)}"
        return [Check(_USABLE, "NO", problem, command, "or set DISTORCH_DISK to another folder")]
    found = [Check(_USABLE, "ok", str(folder))]
    free = shutil.disk_usage(folder).free
    name, said = "the disk has room", f"{human_bytes(free)} free"
    full = free <= _LOW_BYTES
    found.append(Check(name, "NO", said, **elsewhere) if full else Check(name, "ok", said))
    name = "donor files go to a disk, not to RAM"
    in_memory = _native.in_memory(folder)
    if in_memory:
        found.append(Check(name, "NO", "they take RAM", **elsewhere))
    else:
        found.append(Check(name, "ok", "a disk"))
    if full:
        return found
    if not in_memory:  # the rate of RAM says nothing
        direct = _unbuffered_reads(folder)
        found += [_direct_check(direct), _rate_check(direct)]
    return [*found, *(bits_check("disk", compute) for compute in ("cpu", *accelerators))]


def _unusable(folder: Path) -> str:
    """Why no file can be made in a folder; "" if one can."""
    try:
        if not folder.is_dir():
            return f"{str(folder)!r} {'is a file' if folder.exists() else 'is not there'}"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return f"no file can be made in {str(folder)!r}: {error.strerror}"
    return ""


def _direct_check(direct: bool) -> Check:
    name = "files are read without taking RAM"
    if direct:
        return Check(name, "ok", "yes (O_DIRECT)")
    hint = "set DISTORCH_DISK to a folder on ext4, xfs or btrfs"
    return Check(name, "slow", "no: they go through the page cache", hint=hint)


def _rate_check(direct: bool) -> Check:
    name = "the disk is fast enough to stream from"
    how = "measured without the page cache" if direct else "perhaps from the page cache"
    hint = "set DISTORCH_DISK to a folder on a solid-state disk, or give the disk less in the spec"
    rates: list[float] = []

    def try_it() -> str:
        rates.append(measure_disk())
        return f"{rates[0] / 1e9:.2f} GB/s, {how}"

    check = tried(name, try_it, hint=hint)
    if rates and rates[0] < _SLOW:
        return Check(name, "slow", check.found, hint=hint)
    return check


def _unbuffered_reads(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()
        try:
            os.close(os.open(file.name, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
        except OSError:
            return False
    return hasattr(os, "O_DIRECT")


def _elsewhere() -> dict[str, str]:
    """The command that names a better folder: on a disk, writable, with the most room. If there is
    none, a hint.
    """
    free: dict[Path, int] = {}
    with suppress(RuntimeError, OSError):  # no home folder, or the current one is gone
        for folder in (Path("/var/tmp"), Path.cwd(), Path.home()):
            if not _unusable(folder) and not _native.in_memory(folder):
                free[folder] = shutil.disk_usage(folder).free
    best = max(free, key=lambda folder: free[folder], default=None)
    if best is None or free[best] <= _LOW_BYTES:
        return {"hint": "set DISTORCH_DISK to a folder on a disk with room; none was found here"}
    return {"command": f"export DISTORCH_DISK={_quoted(best)}"}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
