# SPDX-License-Identifier: Apache-2.0
"""Aligned tables as text and as HTML, and byte counts that people can read."""

from __future__ import annotations

import html
from collections.abc import Sequence

from distorch.errors import printable

_MOST_LETTERS = 500  # of a cell: sentences of our own have less, names of strangers any number
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def shortened(text: str, most: int) -> str:
    """The text in at most `most` printable characters. A longer one keeps its two ends."""
    text = printable(text)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def unit_of(nbytes: float) -> tuple[str, int]:
    """The unit in which people read such a size, and its bytes, such as ("MiB", 1048576)."""
    power = 0
    while abs(nbytes) >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return _UNITS[power], 1024**power


def human_bytes(nbytes: float) -> str:
    """ "2.50 GiB": powers of 1024, two decimals."""
    unit, size = unit_of(nbytes)
    return f"{int(nbytes)} B" if unit == "B" else f"{nbytes / size:.2f} {unit}"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:2].lstrip("-").isdigit()


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Columns aligned by width, numbers to the right. Of long cells it has the two ends."""
    table = [list(header), *([shortened(cell, _MOST_LETTERS) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    right = [
        bool(rows) and all(_is_number(row[i]) or not row[i] for row in rows)
        for i in range(len(header))
    ]
    lines = [title] if title else []
    for number, row in enumerate(table):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """The same table for notebooks."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def paragraphs(lines: Sequence[str]) -> str:
    """Sentences for notebooks."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _html_cell(cell: str) -> str:
    side = "right" if _is_number(cell) else "left"
    return f'<td style="text-align:{side}">{html.escape(shortened(cell, _MOST_LETTERS))}</td>'
