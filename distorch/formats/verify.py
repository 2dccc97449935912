# SPDX-License-Identifier: Apache-2.0
"""verify=True: checkpoints whose bytes are compared with what they were (Note [Verified files])."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distorch.display.progress import Progress, progress_of
from distorch.formats.checkpoint import open_checkpoint
from distorch.formats.files import find_files
from distorch.formats.unchanged import Sums, forget_sums, known_sums, stamp_of, take_sums


@contextmanager
def verifying(file: str | os.PathLike[str], progress: Progress = None) -> Iterator[None]:
    """Checkpoints that are opened meanwhile are verified if they have files of `file`. They remain
    so for whoever keeps them.

    Args:
        file: As `open_checkpoint` takes it. Files without known sums are read whole.
        progress: As in `distribute`. A function of the caller's hears nothing.

    Raises:
        FetchError: Bytes are not what they were.
        FormatError: A file is damaged, or not what its name in the hub's cache says.
    """
    held = _verify(file, progress, whole=False)
    yield
    held.clear()


def compare_whole(file: str | os.PathLike[str], progress: Progress = None) -> dict[Path, bool]:
    """Reads the files of a checkpoint whole, from the disk. File -> whether it had sums to be
    compared with.

    Raises FetchError, FormatError, as `verifying` does.
    """
    return {sums.path: known for sums, known in _verify(file, progress, whole=True)}


def forget(file: str | os.PathLike[str]) -> None:
    """The next time that this checkpoint is verified counts as the first. FormatError, OSError."""
    for path in find_files(file).paths:
        forget_sums(path.resolve())


def _verify(
    file: str | os.PathLike[str], progress: Progress, *, whole: bool
) -> list[tuple[Sums, bool]]:
    """The sums of each file, and whether they were known. If they were, a file is read only if
    `whole`.
    """
    paths = [path.resolve() for path in find_files(file).paths]
    known = {path: known_sums(path, stamp_of(path)) for path in paths}
    opened = open_checkpoint(file).opened
    total = sum(opened[str(p)].stamp[1] for p, sums in known.items() if whole or sums is None)
    shown = progress if total and not callable(progress) else False
    found = []
    with progress_of(shown, total, "verifying") as done:
        for path, sums in known.items():
            if sums is None:
                of_file = opened[str(path)]
                found.append((take_sums(path, of_file.stamp, of_file.cuts, done), False))
                continue
            if whole:
                sums.forget_cached()
                sums.compare_all(done)
            found.append((sums, True))
    return found
