# SPDX-License-Identifier: Apache-2.0
"""Small files: read within limits, and written whole or not at all.

What is read here came with a stranger's model, or lies where others may write. So it is opened in
a way that cannot hang, and it takes a bounded amount of memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from distorch.errors import FormatError

MOST_JSON = 32 << 20  # bytes: an index of 300,000 tensors; parsed, it takes less than 1 GB
MOST_TRACE = 256 << 20  # bytes: more than a million spans


def kind_of(path: str | os.PathLike[str]) -> Literal["file", "folder", "other", ""]:
    """What is under a path: "other" is a pipe, a socket or a device, "" is nothing.

    Nothing is under names that no file can have, either: too long, or with a zero byte.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - takes text, too
    except (OSError, ValueError):
        return ""
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens an ordinary file to read. OSError for all else: a pipe or a device could hang."""
    # Without O_NONBLOCK, opening a named pipe waits for somebody who writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no ordinary file, but a folder, a pipe or a device", str(path))
    return os.fdopen(descriptor, "rb")


def is_own(file: Path) -> bool:
    """Whether nobody else can have written a file: the user owns it and its folder. OSError."""
    for path in file, file.parent:
        status = path.stat()
        others_write = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid != os.geteuid() or others_write:
            return False
    return True


def read_json(path: str | os.PathLike[str], most: int = MOST_JSON) -> Any:
    """What a JSON file says.

    OSError if it cannot be read; ValueError if it is too large or not JSON. Both say why.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"it has more than {most >> 20} MiB, so it is none that is meant")
        data = file.read(most) or b""  # None: some files in /proc want to be waited for
    return parse_json(data.decode())


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that has to be a table of keys. FormatError if it is none, or cannot be read."""
    try:
        read = read_json(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise FormatError(f"{str(path)!r}: expected a table of keys, found {read!r:.80}")
    return read


def parse_json(text: str) -> Any:
    """As `json.loads`, but what is nested too deeply is a ValueError, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_atomically(target: Path, content: str | bytes, *, private: bool = False) -> None:
    """Writes a file (text as UTF-8). If that fails, an older file is unchanged.

    As an ordinary write does, it follows links and keeps the permissions of an older file (those
    to read, write and run). What is no ordinary file, such as /dev/null or a pipe, is written to
    as it is.

    `private`: nobody else may read the file, and an older file or link is replaced, not followed.

    Raises OSError, which names the file.
    """
    data = content.encode() if isinstance(content, str) else content
    real = target if private else Path(os.path.realpath(target))
    if not private:
        check_not_strangers(target)
    try:
        if not private and kind_of(real) == "other":
            real.write_bytes(data)
            return
        _write_new(real, data, 0o600 if private else _permissions(real))
    except OSError as error:  # it may name a temporary file
        raise OSError(error.errno, error.strerror, str(target)) from error


def _permissions(path: Path) -> int | None:
    """Those of the older file. If it is another user's, nobody else may write to the new one.
    None: there is no older file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mode & (0o777 if status.st_uid == os.geteuid() else 0o755)


def check_not_strangers(path: Path) -> None:
    """PermissionError if another user put a link, a pipe or a device there.

    In a folder in which everybody may write, such as /tmp, a link could lead to the user's own
    files. Links of the user, of root and of the folder's owner are meant.
    """
    try:
        status, folder = path.lstat(), path.parent.stat()
    except OSError:
        return  # nothing is there, or writing will say why not
    known = status.st_uid in (os.geteuid(), 0, folder.st_uid)
    if not known and not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "another user put a link or a pipe there", str(path))


def _write_new(path: Path, data: bytes, mode: int | None) -> None:
    """Puts a new file in the place of an older one, with these permissions or the usual ones."""
    flags, first_mode = os.O_WRONLY | os.O_CLOEXEC, 0o666 if mode is None else mode
    try:
        descriptor = os.open(path.parent, flags | os.O_TMPFILE, first_mode)
    except OSError:  # not on this file system; or there is no such folder, which is said below
        _write_beside(path, data, mode)
        return
    with os.fdopen(descriptor, "wb") as file:
        _fill(file, data, mode)
        _give_name(descriptor, path)


def _write_beside(path: Path, data: bytes, mode: int | None) -> None:
    """The same where files have names from the beginning. A process that is killed meanwhile leaves
    a half of one.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL
    descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _fill(file, data, mode)
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the disk can be read only; the error above is the one to tell
            temporary.unlink(missing_ok=True)


def _fill(file: BinaryIO, data: bytes, mode: int | None) -> None:
    if mode is not None:
        os.fchmod(file.fileno(), mode)  # whatever the user's mask has taken away
    file.write(data)
    file.flush()
    os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name


def spare_name(path: Path) -> Path:
    """The name that a new file has for a moment, before it takes the place of `path`."""
    return path.with_name(f".{uuid.uuid5(uuid.NAMESPACE_URL, path.name).hex}.tmp")


def _give_name(descriptor: int, path: Path) -> None:
    """Gives a complete file that has no name yet the name `path`, in place of an older file.

    Linux cannot do this in one step. So the new file has a spare name for a moment. A process that
    is killed in this moment leaves a whole file there. The spare name depends on the path alone, so
    one file is left at most, and the next write to the path takes it away.
    """
    spare = spare_name(path)
    try:
        if _linked(descriptor, path):  # there was no older file
            # One was left when there was. If a thread is just writing it, it counts as older, too.
            with suppress(OSError):
                if _is_this_users(spare):
                    spare.unlink()
            return
        while not _linked(descriptor, spare):
            spare = _cleared(spare, path)
        with suppress(FileNotFoundError):  # another writer has moved it there: see _cleared
            spare.replace(path)
    except BaseException:
        with suppress(OSError):
            if os.path.samestat(spare.lstat(), os.fstat(descriptor)):
                spare.unlink()
        raise


def _linked(descriptor: int, path: Path) -> bool:
    """Gives an open file a name. False if some file has that name."""
    try:
        # Any directory: it makes Python follow the link in /proc, and the path is absolute.
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
    except FileExistsError:
        return False
    return True


def _cleared(spare: Path, path: Path) -> Path:
    """A name that is likely to be free now. The file that has it may be one that was left, or that
    of a thread or process that is just writing. In both cases it is whole, and it goes to its
    place, as its writer would have it.
    """
    try:
        if _is_this_users(spare):
            spare.replace(path)
            return spare
    except FileNotFoundError:  # its writer has moved it
        return spare
    except OSError:  # it is a folder
        pass
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


def _is_this_users(path: Path) -> bool:
    """Whether the user owns what is there, or nothing is there."""
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return True
