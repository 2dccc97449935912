# SPDX-License-Identifier: Apache-2.0
"""Whether a file is what it was: by its stamp, and if that is wanted, by checksums of its blocks.

Note [Verified files]
A disk or a memory that fails does not change a file's size or time. Nor does a program that puts
the time back. So a file that is verified has a checksum for every block: 64 KiB of one tensor,
or less. The file is read whole when it is verified first, and its checksums are kept in the cache
folder for later processes.

As long as a `Sums` lives, File::read (csrc/core/file.h) compares each block before it gives any
byte of it away. Loads, fetches and originals of LoRAs all read through it, so they need no second
read. What Python reads by itself is compared when a checkpoint is opened (`Sums.compare_unread`).
Each checkpoint, and each original of a weight, keeps the `Sums` of its files.

The sums belong to one stamp. A file that was replaced is another file, with sums of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from distorch import _native, _ops
from distorch._small_files import MOST_JSON, is_own, open_regular, read_json, write_atomically
from distorch.errors import FormatError, warn_at_caller
from distorch.formats.stored import StoredTensor

# What tells whether a file is still the one that it was: inode, bytes, nanoseconds of its last
# change.
Stamp = tuple[int, int, int]

_CHUNK = 64 << 20  # bytes that are read at one time: whole blocks
_VERSION = 1  # of what is kept; a file of another version is not believed
_HUB_NAME = re.compile("[0-9a-f]{64}")


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """A file's stamp now. FormatError if it is not there."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise FormatError(f"cannot look at {str(path)!r}: {error}") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def changed_meanwhile(path: str | Path) -> str:
    """What an error says of a file that is another one since its checksums were taken."""
    return f"{str(path)!r} was written to while it was verified: load it again"


class Sums:
    """The checksums of one file, as long as it lives. See Note [Verified files].

    `cuts`: where tensors begin and end, in bytes. No block has bytes of two tensors, so that one
    that is damaged leaves the others usable. `sums`: four bytes for each block.
    """

    def __init__(self, path: Path, stamp: Stamp, cuts: list[int], sums: bytes) -> None:
        """Raises FormatError if the file is not there, or has other blocks."""
        self.path, self.stamp = path, stamp
        try:
            self._held = _native.verify_file(str(path), stamp[1], cuts, sums)
        except ValueError as error:
            raise FormatError(str(error)) from error
        _alive[str(path)] = self

    def compare(self, begin: int, end: int, done: Callable[[int], object] | None = None) -> None:
        """Reads that range of bytes. `done` is told how many were read since its last call.

        FetchError if they are not what they were.
        """
        for _, data in _chunks(self.path, begin, end):
            if done is not None:
                done(len(data))

    def compare_all(self, done: Callable[[int], object] | None = None) -> None:
        """The same with the whole file."""
        self.compare(0, self.stamp[1], done)

    def forget_cached(self) -> None:
        """Lets go of the system's copies in memory, so that the next read asks the disk."""
        with open_regular(self.path) as file:
            os.fdatasync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def compare_unread(self, tensors: Sequence[StoredTensor]) -> None:
        """Compares what the readers of formats read by themselves: all that is in no tensor. If
        they have read tensors, that is the whole file. FetchError.
        """
        if any(tensor.data is not None for tensor in tensors):
            return self.compare_all()
        end = 0
        for begin, behind in sorted(tensor.span for tensor in tensors if tensor.nbytes):
            if begin > end:
                self.compare(end, begin)
            end = max(end, behind)
        return self.compare(end, self.stamp[1])


# By path.
_alive: WeakValueDictionary[str, Sums] = WeakValueDictionary()


def live_sums(path: Path, stamp: Stamp) -> Sums | None:
    """The file's checksums, if somebody verifies it now."""
    found = _alive.get(str(path))
    return found if found is not None and found.stamp == stamp else None


def known_sums(path: Path, stamp: Stamp) -> Sums | None:
    """The file's checksums, if somebody verifies it now, or did before this process. Warns of sums
    that are there and are not believed.
    """
    if (found := live_sums(path, stamp)) is not None:
        return found
    try:
        kept = _file_of(path)
        if not is_own(kept):
            raise ValueError("another user could have written them")
        told = read_json(kept)
        if told["stamp"] != list(stamp):
            return None  # of a file that was replaced
        return Sums(path, stamp, *_believed(told))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, TypeError):  # their texts would say nothing to anybody
        why = "they are damaged"
    except (OSError, ValueError) as error:
        why = str(error)
    warn_at_caller(
        f"the checksums that were kept of {str(path)!r} are not used: {why}. "
        "They are taken anew, and the file counts as right as it is now",
        UserWarning,
    )
    return None


def take_sums(path: Path, stamp: Stamp, cuts: Sequence[int], done: Callable[[int], object]) -> Sums:
    """Reads the file whole, and keeps its sums. `cuts`: where tensors begin and end, in bytes.
    `done` is told how many bytes were read since its last call.

    Raises FetchError, and FormatError if it is not what its name in the hub's cache says.
    """
    cuts = sorted({cut for cut in cuts if 0 < cut < stamp[1]})
    in_hub = _HUB_NAME.fullmatch(path.name) is not None and path.parent.name == "blobs"
    digest = hashlib.sha256() if in_hub else None
    sums = bytearray()
    for begin, data in _chunks(path, 0, stamp[1]):
        sums += _native.block_sums(data, begin, cuts)
        if digest is not None:
            digest.update(data)
        done(len(data))
    if stamp_of(path) != stamp:
        raise FormatError(changed_meanwhile(path))
    if digest is not None and digest.hexdigest() != path.name:
        raise FormatError(
            f"{str(path)!r} is not what the hub has under that name: its SHA-256 is "
            f"{digest.hexdigest()}. Delete the file and download it again"
        )
    taken = Sums(path, stamp, cuts, bytes(sums))
    _keep(path, stamp, cuts, bytes(sums))
    return taken


def forget_sums(path: Path) -> None:
    """The next time that this file is verified counts as the first. OSError."""
    _file_of(path).unlink(missing_ok=True)


def _chunks(path: Path, begin: int, end: int) -> Iterator[tuple[int, bytearray]]:
    """The bytes [begin, end) of a file, piece by piece: where one begins, and the piece, which the
    next one replaces. FetchError, FormatError.
    """
    room = bytearray(min(_CHUNK, end - begin))
    while begin < end:
        if end - begin < len(room):
            room = bytearray(end - begin)
        _ops.read_file(str(path), begin, torch.frombuffer(room, dtype=torch.uint8))
        yield begin, room
        begin += len(room)


def _file_of(path: Path) -> Path:
    """Where the sums of a checkpoint are kept. OSError."""
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return _native.cache_folder() / f"sums-{name}.json"


def _sum_of(cuts: list[int], sums: bytes) -> int:
    """So that a fault in the cache is not taken for one in the checkpoint."""
    return zlib.crc32(sums, zlib.crc32(json.dumps(cuts).encode()))


def _believed(told: Any) -> tuple[list[int], bytes]:
    """Cuts and sums from a cache file. ValueError, KeyError or TypeError if they are damaged."""
    if told["version"] != _VERSION:
        raise ValueError("another version of distorch took them")
    cuts, sums = told["cuts"], base64.b64decode(told["sums"], validate=True)
    if _sum_of(cuts, sums) != told["crc32"]:
        raise ValueError("they are damaged")
    return cuts, sums


def _keep(path: Path, stamp: Stamp, cuts: list[int], sums: bytes) -> None:
    told = {
        "version": _VERSION, "file": str(path), "stamp": stamp, "cuts": cuts,
        "sums": base64.b64encode(sums).decode(), "crc32": _sum_of(cuts, sums),
    }  # fmt: skip
    text = json.dumps(told)
    try:
        if len(text) > MOST_JSON:
            raise OSError("there are too many of them for one file")
        _native.made_cache_folder()
        write_atomically(_file_of(path), text, private=True)
    except OSError as error:
        warn_at_caller(
            f"the checksums of {str(path)!r} cannot be kept: {error}. They hold for this process; "
            "the next one takes them anew. XDG_CACHE_HOME names the folder for them",
            UserWarning,
        )
