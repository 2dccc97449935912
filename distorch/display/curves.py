# SPDX-License-Identifier: Apache-2.0
"""Pictures of what more memory is worth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from distorch.display.page import EDGE, Page, ticks
from distorch.display.picture import BLACK, GREY, Picture, Rect, Text, text_width
from distorch.display.tables import human_bytes, unit_of
from distorch.display.timelines import FETCHED, RESIDENT

_HEIGHT = 180  # pixels of the longest step
_LAST = 28.0  # pixels of the last column
_BETWEEN = 1.0  # pixels between two columns


def curve_picture(
    title: str,
    points: Sequence[tuple[int, float]],
    resident_seconds: float,
    *,
    marks: dict[int, str],
    label: str,
    notes: Sequence[str] = (),
) -> Picture:
    """A column for each point (bytes, seconds): what a step takes if a device holds so much. It is
    as wide as the way to the next point.

    The lower part of a column is `resident_seconds`, the rest is what offloading costs. `marks` has
    words that stand above some points, by their bytes. `label` says what the bytes are of.
    """
    page = Page(title)
    page.heading(title)
    end = max((nbytes for nbytes, _ in points), default=0)
    longest = max((seconds for _, seconds in points), default=0.0)
    left = EDGE + 60.0
    pixels = page.width - EDGE - left - _LAST
    page.skip(16)
    bottom = page.y + _HEIGHT
    scale = _HEIGHT / longest if longest else 0.0
    _seconds_axis(page, left, bottom, longest)
    edges = [left + (pixels * nbytes / end if end else 0.0) for nbytes, _ in points]
    edges.append(page.width - EDGE)
    for (nbytes, seconds), (x, until) in zip(points, pairwise(edges), strict=True):
        width = max(1.0, until - x - _BETWEEN)
        lower = min(resident_seconds, seconds) * scale
        said = f"{human_bytes(nbytes)}: {seconds * 1e3:.3f} ms"
        page.add(
            Rect(x, bottom - seconds * scale, width, seconds * scale - lower, FETCHED, said),
            Rect(x, bottom - lower, width, lower, RESIDENT, said),
        )
        if words := marks.get(nbytes):
            half = text_width(words, 11) / 2
            middle = min(max(x + width / 2, left + half), page.width - EDGE - half)
            page.add(Text(middle, bottom - seconds * scale - 4, words, BLACK, 11, "middle"))
    page.y = bottom
    unit, size = unit_of(end)
    page.axis(left, pixels, end / size, lambda n: f"{n:g} {unit}" if n else "0", label)
    page.skip(4)
    page.legend([(RESIDENT, "with all weights resident"), (FETCHED, "what offloading adds")])
    page.notes(notes)
    return page.picture()


def _seconds_axis(page: Page, left: float, bottom: float, longest: float) -> None:
    if not longest:
        return
    page.add(Rect(left - 6, bottom - _HEIGHT, 1, _HEIGHT, GREY))
    for value in ticks(longest * 1e3):
        y = bottom - _HEIGHT * value / (longest * 1e3)
        page.add(Rect(left - 10, y, 4, 1, GREY))
        page.add(Text(left - 13, y + 4, f"{value:g}", GREY, 11, "end"))
    page.add(Text(EDGE, bottom - _HEIGHT - 8, "ms of a step", GREY, 11))
