# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar, lines in a log, or a function of the caller's.

Under `nohup`, in a container or in a pipeline, the output goes to a file. A bar would fill it with
carriage returns, and silence looks like a program that hangs. So a line is written now and then.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from distorch.display.tables import human_bytes
from distorch.errors import SpecError

# None: a bar on a terminal and in a notebook, else a line every few seconds. True, False: always,
# never. A function is called with the bytes that were done since its last call.
Progress = bool | Callable[[int], object] | None

_EVERY = 5.0  # seconds between two lines
_DELAY = 0.5  # seconds before a bar is shown, so that quick work shows none


def check_progress(progress: Progress) -> None:
    """Raises SpecError on what is no progress option."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise SpecError(
            f"progress={progress!r}: expected None (a bar on a terminal), True, False, or a "
            "function that is called with the bytes of each weight that is done"
        )


@contextmanager
def progress_of(
    progress: Progress, total: int, what: str, unit: str = "B"
) -> Iterator[Callable[[int], object]]:
    """Gives a function. Call it with what was done since the last call.

    `total` is to be done in all, in bytes or in another `unit`. `what` stands before the bar.
    Raises SpecError on a wrong option.
    """
    check_progress(progress)
    if callable(progress):
        yield progress
        return
    out = sys.stderr
    if progress is False or out is None or not (total > 0 or progress):
        yield _nothing
        return
    shown: _Bar | _Lines
    if in_notebook() or _is_terminal(out):
        shown = _Bar(total, what, unit, delay=0.0 if progress else _DELAY)
    else:
        shown = _Lines(out, total, what, unit, always=progress is True)
    try:
        yield shown.update
    finally:
        shown.close()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = getattr(ipython, "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty()
    except Exception:  # it is closed, or an object of somebody's that only knows `write`
        return False


def _nothing(done: int) -> None:
    pass


# Whatever goes wrong with showing progress: the work goes on. Terminals vanish, pipes close, the
# front end of a notebook is gone, and `sys.stderr` may be any object.
_unshown = suppress(Exception)


class _Bar:
    """A bar of tqdm. After a failure it is left alone."""

    def __init__(self, total: int, what: str, unit: str, *, delay: float) -> None:
        self._bar: Any = None
        with _unshown, warnings.catch_warnings():
            # In a notebook without ipywidgets tqdm warns, and then writes a bar of text.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=total, desc=what, delay=delay, **_size(),
                unit="iB" if unit == "B" else unit, unit_scale=unit == "B", unit_divisor=1024,
            )  # fmt: skip

    def update(self, done: int) -> None:
        self._try("update", done)

    def close(self) -> None:
        self._try("close")

    def _try(self, method: str, *arguments: int) -> None:
        if self._bar is None:
            return
        try:
            getattr(self._bar, method)(*arguments)
        except Exception:
            self._bar.disable = True  # its end would try again to write
            self._bar = None


def _size() -> dict[str, int]:
    """The size to tell tqdm, if it would take a wrong one. A terminal in a container may have 0
    columns, and tqdm then draws an empty bar.
    """
    with _unshown:
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return {"ncols": 80, "nrows": 24}
    return {}


class _Lines:
    """Writes a line every few seconds. A last one comes at the end, if there was one before or if
    `always` is set.
    """

    def __init__(self, out: TextIO, total: int, what: str, unit: str, *, always: bool) -> None:
        self._out = out
        self._total = total
        self._what = what
        self._unit = unit
        self._always = always
        self._done = self._told = 0
        self._begin = self._said = time.monotonic()

    def update(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._said >= _EVERY:
            self._said = now
            self._say(now)

    def close(self) -> None:
        if self._always or self._told and self._told != self._done:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        self._told, self._always = self._done, False
        took = max(now - self._begin, 1e-9)
        rate = self._done / took
        share = 100 * self._done / max(self._total, 1)
        left = (self._total - self._done) / rate if rate else 0.0
        time_said = f"{left:.0f} s left" if self._done < self._total else f"{took:.0f} s"
        line = (
            f"{self._what}: {self._amount(self._done)} of {self._amount(self._total)} "
            f"({share:.0f}%), {self._amount(rate)}/s, {time_said}\n"
        )
        with _unshown:
            self._out.write(line)
            self._out.flush()

    def _amount(self, number: float) -> str:
        return human_bytes(number) if self._unit == "B" else f"{number:.3g} {self._unit}"
