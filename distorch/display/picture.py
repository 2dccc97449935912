# SPDX-License-Identifier: Apache-2.0
"""Pictures made of rectangles and text, as SVG and as PNG.

Placements and timelines are rectangles. So we write SVG ourselves: it takes no other package, and
every notebook shows it. Pillow makes a PNG of the same picture.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distorch._small_files import write_atomically
from distorch.errors import SpecError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

BLACK, GREY, RED, WHITE = "#222222", "#666666", "#c0392b", "#ffffff"
Anchor = Literal["start", "middle", "end"]
# Twice as many pixels, so that text is sharp where a page is scaled up.
_SCALE = 2
_NO_PILLOW = "PNG needs Pillow 10.1 or newer: pip install pillow. SVG needs nothing"


@dataclass(frozen=True)
class Rect:
    """A rectangle, in pixels from the upper left corner. `title` is shown under the pointer."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """One line of text. `y` is its baseline, `anchor` the part of it that stands at `x`."""

    x: float
    y: float
    text: str
    colour: str = BLACK
    size: int = 12
    anchor: Anchor = "start"


def text_width(text: str, size: int = 12) -> float:
    """Estimates the width of a line in pixels. Fonts differ, so the estimate is a large one."""
    return size * sum(map(_char_width, text))


def _char_width(char: str) -> float:
    """The width of a letter in parts of its size, as sans-serif fonts have it."""
    if unicodedata.east_asian_width(char) in "WF":
        return 1.08
    if char in "MW@%…":
        return 1.0
    if char.isupper():
        return 0.75
    return 0.33 if char in "ijl.,:;|!'() " else 0.6


@dataclass(frozen=True)
class Picture:
    """A picture, which Jupyter shows. `save` writes it as SVG or PNG.

    Attributes:
        title: What it shows, for those who cannot see it.
        width: Pixels.
        height: Pixels.
        shapes: What it is made of, the lowest first.
    """

    title: str
    width: int
    height: int
    shapes: tuple[Rect | Text, ...]

    def svg(self) -> str:
        """The picture as SVG. It needs no other file, and runs nothing."""
        size = f'width="{self.width}" height="{self.height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
                f'viewBox="0 0 {self.width} {self.height}" role="img" '
                'font-family="Helvetica, Arial, sans-serif" style="max-width:100%;height:auto">',
                f"<title>{_escaped(self.title)}</title>",
                f'<rect {size} fill="{WHITE}"/>',
                *map(_svg, self.shapes),
                "</svg>\n",
            ]
        )

    def image(self, scale: int = 1) -> Image:
        """The picture as an image of Pillow, RGB, `scale` pixels for each of its own.

        Raises:
            ImportError: Pillow is not installed, or older than 10.1.
        """
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise ImportError(_NO_PILLOW) from error
        image = Image.new("RGB", (self.width * scale, self.height * scale), WHITE)
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Rect):
                left, top, right, bottom = _edges(shape, scale)
                if left < right and top < bottom:  # Pillow fills the last pixel, too
                    draw.rectangle((left, top, right - 1, bottom - 1), fill=shape.colour)
                continue
            x, y = shape.x * scale, shape.y * scale
            try:
                font = ImageFont.load_default(size=shape.size * scale)
            except TypeError as error:
                raise ImportError(_NO_PILLOW) from error
            place = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            text = printable(shape.text)
            draw.text((x, y), text, fill=shape.colour, font=font, anchor=place)
        return image

    def png(self) -> bytes:
        """The picture as PNG, with two pixels for each of its own.

        Raises:
            ImportError: Pillow is not installed, or older than 10.1.
        """
        found = io.BytesIO()
        self.image(_SCALE).save(found, "PNG", optimize=True)
        return found.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture. The end of the name says how: .svg or .png.

        Raises:
            SpecError: The name ends otherwise, or `path` is no path.
            FileNotFoundError: Its folder is not there.
            IsADirectoryError: There is a folder of this name.
            ImportError: A PNG without Pillow.

        If one is raised, an older file is unchanged.
        """
        target = _target(path)
        is_svg = target.suffix.lower() == ".svg"
        write_atomically(target, self.svg() if is_svg else self.png())

    def saved(self, path: str | os.PathLike[str]) -> Picture:
        """Saves the picture, and returns it."""
        self.save(path)
        return self

    def __repr__(self) -> str:
        return f"<Picture: {printable(self.title)}, {self.width} x {self.height}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, Any]:
        # Web pages and notebooks that are not trusted show no SVG, so a PNG goes along.
        found = {"text/plain": repr(self), "image/svg+xml": self.svg()}
        with contextlib.suppress(ImportError):
            found["image/png"] = base64.b64encode(self.png()).decode()
        return {
            kind: data
            for kind, data in found.items()
            if (not include or kind in include) and kind not in (exclude or ())
        }


def _target(path: str | os.PathLike[str]) -> Path:
    """The path of a picture. Raises as `Picture.save` does."""
    if not isinstance(path, str | os.PathLike):
        raise SpecError(f"a picture: expected a path that ends in .svg or .png, got {path!r:.80}")
    target = Path(path)
    if target.suffix.lower() not in (".svg", ".png"):
        raise SpecError(f"a picture: expected a name that ends in .svg or .png, got {str(path)!r}")
    if target.is_dir():
        raise IsADirectoryError(f"a picture: {str(target)!r} is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"a picture: the folder {str(target.parent)!r} is not there; make it"
        )
    return target


def _edges(rect: Rect, scale: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in whole pixels. Neighbours share an edge, so none covers another;
    what is thinner than half a pixel vanishes.
    """
    right, bottom = rect.x + rect.width, rect.y + rect.height
    whole = [math.floor(edge * scale + 0.5) for edge in (rect.x, rect.y, right, bottom)]
    return whole[0], whole[1], whole[2], whole[3]


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _svg(shape: Rect | Text) -> str:
    place = f'x="{shape.x:.5g}" y="{shape.y:.5g}"'
    if isinstance(shape, Rect):
        size = f'width="{shape.width:.4g}" height="{shape.height:.4g}"'
        start = f'<rect {place} {size} fill="{shape.colour}"'
        title = f"><title>{_escaped(shape.title)}</title></rect>" if shape.title else "/>"
        return start + title
    anchor = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
    look = f'font-size="{shape.size}" fill="{shape.colour}"{anchor}'
    # Several spaces in a name are several spaces in the picture.
    return f'<text {place} {look} xml:space="preserve">{_escaped(shape.text)}</text>'
