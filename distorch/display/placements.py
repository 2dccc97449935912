# SPDX-License-Identifier: Apache-2.0
"""Pictures of what is where: a strip of all weights, and bars of parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from distorch.display.page import EDGE, Page, colours_of
from distorch.display.picture import (
    GREY,
    RED,
    Picture,
    Rect,
    Text,
    text_width,
)
from distorch.display.tables import human_bytes, shortened, unit_of

Held = Mapping[str, int]  # device -> bytes
_STRIP, _BAR = 44, 12  # pixels
_NARROWEST = 1.5  # pixels of a column
_GAP = 0.6  # between two weights that are wide enough to be told apart
_MOST_ROWS = 48
_LONGEST_NAME = 34  # characters


def part_of(name: str) -> str:
    """The part of a model under which a weight is shown: its name up to and with the first index.
    "blocks.3.attention.weight" is in "blocks.3". Without an index it is the first word.
    """
    steps = name.split(".")
    for position, step in enumerate(steps[:-1]):
        if step.isdigit():
            return ".".join(steps[: position + 1])
    return steps[0]


def placement_strip(
    title: str, weights: Iterable[tuple[str, int, str]], held: Held, computes: Collection[str],
    notes: Sequence[str] = (),
) -> Picture:  # fmt: skip
    """Every weight (name, bytes, device) in the order of the model, coloured by device.

    `held` are the bytes of each device, `computes` the devices that run the model.
    """
    page = Page(title)
    page.heading(title)
    page.legend(_legend(held, computes))
    total = sum(held.values())
    listed = [weight for weight in weights if weight[1] > 0]
    _strip(page, listed, total, colours_of(held))
    _name_parts(page, listed, total)
    _bytes_axis(page, total)
    page.notes(notes)
    return page.picture()


def part_bars(
    title: str, parts: Mapping[str, Held], held: Held, computes: Collection[str],
    *, notes: Sequence[str] = (), problems: Sequence[str] = (),
) -> Picture:  # fmt: skip
    """One bar for all, and one for each part of a model or a pipeline, in their order.

    `notes` and `problems` stand below, the latter in red.
    """
    page = Page(title)
    page.heading(title)
    colours = colours_of(held)
    _whole_bar(page, held, computes)
    rows = _neighbours_together(list(parts.items()))
    names = [name for name, _ in rows]
    sizes = [human_bytes(sum(own.values())) for _, own in rows]
    left = EDGE + max(map(text_width, names), default=0) + 8
    right = max(map(text_width, sizes), default=0) + 8
    largest = max((sum(own.values()) for _, own in rows), default=0)
    scale = (page.width - EDGE - right - left) / max(largest, 1)
    for name, size, (_, own) in zip(names, sizes, rows, strict=True):
        page.add(Text(left - 8, page.y + _BAR - 2, name, anchor="end", size=11))
        end = _bar(page, left, _BAR, own, colours, pixels_per_byte=scale)
        page.add(Text(end + 6, page.y + _BAR - 2, size, GREY, 11))
        page.skip(_BAR + 4)
    page.skip(6)
    page.notes(notes)
    page.notes(problems, RED)
    return page.picture()


def device_bar(
    held: Held, computes: Collection[str], note: str, *, ok: bool = True, width: int = 320
) -> Picture:
    """One bar with its legend and a sentence: small enough for a node in a graph."""
    page = Page(note, width)
    _whole_bar(page, held, computes)
    page.notes([note], GREY if ok else RED)
    return page.picture()


def _whole_bar(page: Page, held: Held, computes: Collection[str]) -> None:
    """One bar for all devices, as wide as the page, and what its colours mean."""
    scale = page.room / max(sum(held.values()), 1)
    _bar(page, EDGE, 2 * _BAR, held, colours_of(held), pixels_per_byte=scale)
    page.skip(2 * _BAR + 8)
    page.legend(_legend(held, computes))


def _legend(held: Held, computes: Collection[str]) -> list[tuple[str, str]]:
    total = max(sum(held.values()), 1)
    colours = colours_of(held)
    return [
        (
            colours[device],
            f"{device}{' (compute)' if device in computes else ''}: {human_bytes(nbytes)}, "
            f"{100 * nbytes / total:.1f}%",
        )
        for device, nbytes in held.items()
    ]


def _bar(
    page: Page, x: float, height: float, own: Held, colours: Mapping[str, str],
    *, pixels_per_byte: float,
) -> float:  # fmt: skip
    """The bytes of each device side by side, from `x` on. Returns where the bar ends."""
    for device, nbytes in _in_order(own, colours):
        width, title = nbytes * pixels_per_byte, f"{device}: {human_bytes(nbytes)}"
        page.add(Rect(x, page.y, width, height, colours[device], title))
        x += width
    return x


def _in_order(own: Held, colours: Mapping[str, str]) -> list[tuple[str, int]]:
    """Devices and bytes in the order of the legend, so that every bar has one order."""
    return [(device, own[device]) for device in colours if device in own]


def _strip(
    page: Page, weights: Iterable[tuple[str, int, str]], total: int, colours: Mapping[str, str]
) -> None:
    """Columns in the order of the model.

    A weight that is too narrow to be seen shares a column with its neighbours. There, the devices
    are stacked by their share, so that the colours keep their proportion.
    """
    x = float(EDGE)
    for names, own in _columns(weights, total / page.room * _NARROWEST):
        width = page.room * sum(own.values()) / max(total, 1)
        said = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        y = page.y
        for device, nbytes in _in_order(own, colours):
            height = _STRIP * nbytes / sum(own.values())
            shown = width - _GAP if width > 4 * _GAP else width
            title = f"{said}: {human_bytes(nbytes)} on {device}"
            page.add(Rect(x, y, shown, height, colours[device], shortened(title, 200)))
            y += height
        x += width
    page.skip(_STRIP + 4)


def _columns(
    weights: Iterable[tuple[str, int, str]], least: float
) -> Iterable[tuple[list[str], dict[str, int]]]:
    """Joins neighbours until they have `least` bytes. Yields their names, and bytes by device."""
    names: list[str] = []
    own: dict[str, int] = {}
    for name, nbytes, device in weights:
        if nbytes >= least and names:
            yield names, own
            names, own = [], {}
        names.append(name)
        own[device] = own.get(device, 0) + nbytes
        if sum(own.values()) >= least:
            yield names, own
            names, own = [], {}
    if names:
        yield names, own


def _name_parts(page: Page, weights: Iterable[tuple[str, int, str]], total: int) -> None:
    """The names of parts below the strip, each where it begins, and as many as have room."""
    free, position, last = 0.0, 0, ""
    for name, nbytes, _ in weights:
        part = part_of(name)
        x = EDGE + page.room * position / max(total, 1)
        label = shortened(part, _LONGEST_NAME)
        ends = x + text_width(label, 10)
        if part != last and x >= free and ends <= page.width - EDGE:
            page.add(Rect(x, page.y - 4, 1, 6, GREY), Text(x + 3, page.y + 8, label, GREY, 10))
            free = ends + 8
        position, last = position + nbytes, part
    page.skip(14)


def _bytes_axis(page: Page, total: int) -> None:
    unit, size = unit_of(total)

    def say(value: float) -> str:
        return f"{value:g} {unit}" if value else "0"

    page.axis(EDGE, page.room, total / size, say, "bytes of the model, in the order of its weights")


def _neighbours_together(rows: list[tuple[str, Held]]) -> list[tuple[str, Held]]:
    """About 48 rows at most. If there are more parts, neighbours under one parent share a row."""
    most = -(-len(rows) // _MOST_ROWS) or 1
    parents = [name.rpartition(".")[0] for name, _ in rows]
    together = len(set(parents)) > _MOST_ROWS  # too many parents to keep them apart
    groups: list[list[tuple[str, Held]]] = []
    last = None
    for row, parent in zip(rows, parents, strict=True):
        if not groups or len(groups[-1]) == most or not (together or parent == last):
            groups.append([])
        groups[-1].append(row)
        last = parent
    return [(_range(group[0][0], group[-1][0]), _sum(own for _, own in group)) for group in groups]


def _sum(parts: Iterable[Held]) -> dict[str, int]:
    found: dict[str, int] = {}
    for device, nbytes in (item for own in parts for item in own.items()):
        found[device] = found.get(device, 0) + nbytes
    return found


def _range(first: str, last: str) -> str:
    """One name for neighbours, such as "blocks.0 … 3", which is short enough for a row."""
    if first == last:
        return shortened(first, _LONGEST_NAME)
    parent, _, leaf = first.rpartition(".")
    if parent and parent == last.rpartition(".")[0]:
        last = last.rpartition(".")[2]
        end = shortened(f".{leaf} … {last}", _LONGEST_NAME - 8)
        return shortened(parent, _LONGEST_NAME - len(end)) + end
    half = (_LONGEST_NAME - 3) // 2
    return f"{shortened(first, half)} … {shortened(last, half)}"
