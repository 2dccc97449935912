# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar, or a function of the caller's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from distorch.errors import SpecError

# None: a bar on a terminal and in a notebook. True, False: always, never. A function is called with
# the bytes that were done since its last call.
Progress = bool | Callable[[int], object] | None


def check_progress(progress: Progress) -> None:
    """Raises SpecError on what is no progress option."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise SpecError(
            f"progress={progress!r}: expected None (a bar on a terminal), True, False, or a "
            "function that is called with the bytes of each weight that is done"
        )


@contextmanager
def progress_of(progress: Progress, total: int, what: str) -> Iterator[Callable[[int], object]]:
    """Gives a function that is to be called with the bytes done since its last call.

    `total` bytes are to be done in all; `what` stands before the bar. SpecError.
    """
    check_progress(progress)
    if callable(progress):
        yield progress
        return
    terminal = sys.stderr is not None and sys.stderr.isatty()
    watched = total > 0 and (terminal or "ipykernel" in sys.modules)
    show = watched if progress is None else progress
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show) as bar:
        yield bar.update
