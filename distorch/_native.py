# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled library, once, and tells it what it needs from Python."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from distorch import _library
from distorch._small_files import check_not_strangers
from distorch.errors import FetchError, FormatError, PlacementError, SpecError

if sys.platform != "linux":
    raise ImportError(
        f"distorch runs on Linux only, and this is {sys.platform}: its engine uses calls for files "
        "and memory that only Linux has"
    )

try:
    import torch
except ImportError as error:  # pragma: no cover - needs an environment without torch
    raise ImportError(
        "distorch needs PyTorch 2.11 or newer, which it never installs by itself: "
        "pip install torch, then install distorch again"
    ) from error

if problem := _library.problem(Path(__file__).parent, torch.__version__):
    raise ImportError(problem)

try:
    from distorch import _C
except ImportError as error:
    raise ImportError(
        "distorch's compiled library does not load. Most likely torch was replaced by another "
        f"build of the same version (now {torch.__version__}): {_library.AGAIN}. "
        f"The loader says: {error}"
    ) from error

_IO_THREADS = 6  # that read files, per compute device
_MOST_IO_THREADS = 256
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


def _file_system(folder: Path) -> str:
    """The type of the file system under `folder` ("" when unknown)."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    where = str(folder.resolve())
    for line in mounts:
        _, mount, mount_kind = line.split()[:3]
        mount = mount.replace("\\040", " ")  # as the kernel writes a blank
        inside = where == mount or where.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, mount_kind
    return kind


def in_memory(folder: Path) -> bool:
    """Whether files in that folder take RAM."""
    return _file_system(folder) in _MEMORY_FILE_SYSTEMS


def cache_folder() -> Path:
    """The folder for what can be made again. OSError if this user has no home folder."""
    try:
        return user_cache_path("distorch")
    except RuntimeError as error:  # no HOME, and no entry in /etc/passwd, as in some containers
        raise OSError(f"no cache folder: {error}") from error


def made_cache_folder() -> Path:
    """The same folder, made if it is not there, and closed to other users. OSError."""
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_not_strangers(folder)
    if folder.stat().st_uid != os.geteuid():  # what is in it may be another user's
        raise OSError(errno.EPERM, "it belongs to another user", str(folder))
    folder.chmod(0o700)
    return folder


def scratch_folder() -> Path:
    """Where donor files go: DISTORCH_DISK, else a temporary folder that is on a disk."""
    chosen = os.environ.get("DISTORCH_DISK")
    if chosen:
        try:
            return Path(chosen).expanduser()
        except RuntimeError:  # it begins with ~, and there is no home folder
            return Path(chosen)
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # none can be written to; a donor on disk says what to do
        return Path("/tmp")  # noqa: S108 - files in it have no name
    if not in_memory(temporary):
        return temporary
    try:
        return made_cache_folder()
    except OSError:  # there is no home folder, or it cannot be written to
        return temporary


def _in_utf8(folder: Path) -> str:
    """As C++ takes it. SpecError."""
    path = str(folder)
    if any("\ud800" <= char <= "\udfff" for char in path):
        raise SpecError(
            f"the folder for donors on disk, {path!r}: expected a path in UTF-8; set DISTORCH_DISK"
        )
    return path


def io_threads() -> int:
    """How many threads read files for one compute device. SpecError on a wrong number."""
    chosen = os.environ.get("DISTORCH_IO_THREADS", str(_IO_THREADS))
    if not chosen.isdecimal() or len(chosen) > 4 or not 1 <= int(chosen) <= _MOST_IO_THREADS:
        raise SpecError(
            f"DISTORCH_IO_THREADS={chosen!r}: expected a number of threads, 1 to {_MOST_IO_THREADS}"
        )
    return int(chosen)


_C.set_error_classes(PlacementError, FormatError, FetchError)
_C.set_scratch_directory(_in_utf8(scratch_folder()))
_C.set_io_threads(io_threads())
CUDA_LIBRARY = Path(__file__).parent / "_cuda.so"
_C.set_cuda_library(str(CUDA_LIBRARY))

block_sums = _C.block_sums
counters_id = _C.counters_id
decode_kernel = _C.decode_kernel
fetch_count = _C.fetch_count
has_cuda_kernels = _C.has_cuda_kernels
has_turn = _C.has_turn
new_counters = _C.new_counters
Turn = _C.Turn
calling = _C.calling
calls_of_this_thread = _C.calls_of_this_thread
read_counters = _C.read_counters
reserve = _C.reserve
reserved_beside = _C.reserved_beside
reset_counters = _C.reset_counters
scratch_directory = _C.scratch_directory
set_data = _C.set_data
set_peer_access = _C.set_peer_access
set_decode_kernel = _C.set_decode_kernel
set_host_access = _C.set_host_access
set_read_clock = _C.set_read_clock
start_trace = _C.start_trace
stop_trace = _C.stop_trace
rehearse = _C.rehearse
find_placements = _C.find_placements
step_bound = _C.step_bound
verify_file = _C.verify_file
waiting_for_turn = _C.waiting_for_turn
