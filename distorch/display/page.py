# SPDX-License-Identifier: Apache-2.0
"""The layout that all pictures share: a page that is filled from the top to the bottom."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from distorch.display.picture import (
    GREY,
    Picture,
    Rect,
    Text,
    text_width,
)  # fmt: skip
from distorch.display.tables import shortened

WIDTH, EDGE = 960, 16  # pixels
_LINE = 18  # from one line of text to the next
# Colours that colour-blind readers can tell apart, after Paul Tol's "bright" scheme. RAM and the
# disk have the same colour in every picture. Other places get theirs by their order.
_OWN = {"cpu": "#ee7733", "disk": "#228833"}
_PALETTE = ("#4477aa", "#aa3377", "#66ccee", "#ccbb44", "#332288", "#999933", "#cc6677", "#777777")
_MOST_TICKS = 8
_LONGEST = 400  # characters of a note


def colours_of(devices: Iterable[str]) -> dict[str, str]:
    """A colour for each device."""
    names = dict.fromkeys(devices)
    others = [name for name in names if name not in _OWN]
    return {name: _OWN.get(name) or _PALETTE[others.index(name) % len(_PALETTE)] for name in names}


class Page:
    """A picture that grows downwards. `y` is where the next thing goes, in pixels."""

    def __init__(self, title: str, width: int = WIDTH) -> None:
        self.title = title
        self.width = width
        self.y = float(EDGE)
        self._shapes: list[Rect | Text] = []

    @property
    def room(self) -> float:
        """Pixels between the edges."""
        return self.width - 2 * EDGE

    def add(self, *shapes: Rect | Text) -> None:
        """Puts something on the page. Its `y` is counted from the top."""
        self._shapes += (s for s in shapes if isinstance(s, Text) or s.width > 0)

    def skip(self, pixels: float) -> None:
        """Leaves room."""
        self.y += pixels

    def heading(self, text: str) -> None:
        """A line above what it is about."""
        size = 14
        most = int(self.room / text_width("x", size))
        self.add(Text(EDGE, self.y + size, shortened(text, most), size=size))
        self.y += _LINE + 6

    def notes(self, sentences: Iterable[str], colour: str = GREY) -> None:
        """Sentences below each other, each in as many lines as it takes."""
        most = int(self.room / text_width("x"))
        for text in sentences:
            for line in textwrap.wrap(shortened(text, _LONGEST), most):
                self.add(Text(EDGE, self.y + 12, line, colour))
                self.y += _LINE

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """What each colour means: (colour, words), in as many lines as it takes."""
        x = float(EDGE)
        for colour, words in entries:
            label = shortened(words, int((self.room - 20) / text_width("x")))
            needed = 18 + text_width(label)
            if x > EDGE and x + needed > self.width - EDGE:
                x, self.y = float(EDGE), self.y + _LINE
            self.add(Rect(x, self.y + 2, 12, 12, colour))
            self.add(Text(x + 17, self.y + 12, label))
            x += needed + 14
        self.y += _LINE + 4

    def axis(
        self, left: float, pixels: float, end: float, say: Callable[[float], str], label: str = ""
    ) -> None:
        """Ticks from 0 to `end` over so many pixels. `say` makes words of a number."""
        self.add(Rect(left, self.y, pixels, 1, GREY))
        for value in ticks(end):
            x = left + pixels * value / end
            self.add(Rect(min(x, left + pixels - 1), self.y, 1, 4, GREY))
            said = say(value)
            half = text_width(said, 11) / 2
            middle = min(max(x, left + half), left + pixels - half)  # on the page
            self.add(Text(middle, self.y + 16, said, GREY, 11, "middle"))
        self.y += _LINE + 2
        if label:
            self.add(Text(left + pixels / 2, self.y + 12, label, GREY, 11, "middle"))
            self.y += _LINE

    def picture(self) -> Picture:
        """What is on the page."""
        return Picture(self.title, self.width, int(self.y + EDGE), tuple(self._shapes))


def ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`: a few steps of 1, 2 or 5 times a power of ten."""
    if not end > 0:
        return []
    tenth = 10.0 ** (math.floor(math.log10(end)) - 1)
    step = next(tenth * times for times in (1, 2, 5, 10, 20) if end / tenth / times <= _MOST_TICKS)
    return [step * number for number in range(int(end / step * (1 + 1e-9)) + 1)]
