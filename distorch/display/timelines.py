# SPDX-License-Identifier: Apache-2.0
"""Pictures of what ran when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distorch.display.page import EDGE, Page
from distorch.display.picture import (
    GREY,
    RED,
    Picture,
    Rect,
    Text,
    text_width,
)
from distorch.display.tables import shortened

RESIDENT, FETCHED, COPY, READ = "#4477aa", "#ee7733", "#f3b48a", "#aa3377"
STALL, OTHER = RED, "#ccbb44"
_ROW, _BETWEEN = 26, 6  # pixels
_GAP = 0.8  # between two pieces that are wide enough to be told apart
_NARROWEST = 2.0  # pixels: what is narrower is drawn with its neighbours
_LONGEST_NAME = 30  # characters


@dataclass(frozen=True)
class Piece:
    """What took from `start` to `end` (seconds), its colour, and what the pointer shows."""

    start: float
    end: float
    colour: str
    title: str = ""


@dataclass(frozen=True)
class Panel:
    """Rows (name, pieces) with one clock. A dotted line stands at `mark` (seconds), if given."""

    title: str
    rows: Sequence[tuple[str, Sequence[Piece]]]
    mark: float | None = None


def timeline_picture(
    title: str, panels: Sequence[Panel], legend: Sequence[tuple[str, str]], label: str,
    notes: Sequence[str] = (),
) -> Picture:  # fmt: skip
    """Panels below each other. All have the same time to the right, from 0.

    `legend` has pairs (colour, words). Ticks count milliseconds, and `label` stands below them.
    """
    page = Page(title)
    end = max((piece.end for panel in panels for _, row in panel.rows for piece in row), default=0)
    names = [_name(name) for panel in panels for name, _ in panel.rows]
    left = EDGE + max(map(text_width, names), default=0) + 8
    pixels = page.width - EDGE - left
    scale = pixels / end if end else 0.0  # pixels per second
    for panel in panels:
        page.heading(panel.title)
        top = page.y
        for name, row in panel.rows:
            page.add(Text(left - 8, page.y + _ROW / 2 + 4, _name(name), anchor="end"))
            _draw_row(page, row, left, scale)
        if panel.mark is not None:
            _dotted(page, left + panel.mark * scale, top - 4, page.y - _BETWEEN + 4)
        page.skip(4)
    page.axis(left, pixels, end * 1e3, lambda value: f"{value:g}", label)
    page.skip(4)
    page.legend(legend)
    page.notes(notes)
    return page.picture()


def _name(name: str) -> str:
    return shortened(name, _LONGEST_NAME)


def _draw_row(page: Page, row: Iterable[Piece], left: float, scale: float) -> None:
    for column in _columns(row, _NARROWEST / scale if scale else 0.0):
        width = (column.end - column.start) * scale
        shown = width - _GAP if column.count == 1 and width > 4 * _GAP else width
        height = _ROW * column.share
        x, y = left + column.start * scale, page.y + _ROW - height
        page.add(Rect(x, y, shown, height, column.colour, column.title))
    page.skip(_ROW + _BETWEEN)


@dataclass
class _Column:
    """One rectangle of a row: a piece that is wide enough to be seen, or narrow neighbours of one
    colour. Its height is the share of its time in which anything ran, so that areas are seconds.
    """

    start: float
    end: float
    colour: str
    first: str
    count: int = 1
    busy: float = 0.0
    until: float = 0.0  # the end of what `busy` has counted

    @property
    def share(self) -> float:
        return min(1.0, self.busy / (self.end - self.start)) if self.end > self.start else 0.0

    @property
    def title(self) -> str:
        if self.count == 1:
            return self.first
        took = f"{self.busy * 1e3:.3f} of {(self.end - self.start) * 1e3:.3f} ms"
        return f"{self.count} pieces, {took}; the first: {self.first}"

    def add(self, piece: Piece) -> None:
        """Counts a piece, which begins no earlier than those before it."""
        self.busy += max(0.0, piece.end - max(piece.start, self.until))
        self.until = max(self.until, piece.end)
        self.end = max(self.end, piece.end)


def _columns(row: Iterable[Piece], least: float) -> Iterable[_Column]:
    """The rectangles of a row, by their start. A piece shorter than `least` seconds is too narrow
    to be seen. It opens a column of that length, and narrow pieces that begin in it join it.
    """
    open_column: _Column | None = None
    for piece in sorted(row, key=lambda piece: piece.start):
        narrow = piece.end - piece.start < least
        fits = open_column is not None and piece.start < open_column.end
        if open_column is not None and narrow and fits and piece.colour == open_column.colour:
            open_column.count += 1
            open_column.add(piece)
            continue
        if open_column is not None:
            yield open_column
        end = max(piece.end, piece.start + least)
        column = _Column(piece.start, end, piece.colour, piece.title, until=piece.start)
        column.add(piece)
        open_column = column if narrow else None
        if not narrow:
            yield column
    if open_column is not None:
        yield open_column


def _dotted(page: Page, x: float, top: float, bottom: float) -> None:
    y = top
    while y < bottom:
        page.add(Rect(x, y, 1, 2, GREY))
        y += 5
