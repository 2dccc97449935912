# SPDX-License-Identifier: Apache-2.0
"""The placement string: grammar, bytes exact, errors that say where and why."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from decimal import Decimal
from operator import index
from typing import NoReturn, SupportsIndex

from distorch.errors import SpecError

EXAMPLE = "cuda:0,2.5gb;cpu,*"
HOST_TIERS = ("cpu", "disk")
DEVICE_TYPES = (
    "cuda", "xpu", "mps", "hpu", "mtia", "maia", "npu", "mlu", "musa", "xla", "sim",
    "privateuseone",
)  # fmt: skip
# What people write for a device, and its name here.
_CALLED = {
    "gpu": "cuda", "vram": "cuda", "hip": "cuda", "rocm": "cuda", "ram": "cpu",
    "host": "cpu", "ssd": "disk", "nvme": "disk", "hdd": "disk", "file": "disk",
}  # fmt: skip
_UNIT_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_MOST_TEXT = 4096  # characters: much more than any machine has devices for
_MOST_INDEX_DIGITS = 4
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z%]*)\Z")
_UNIT = re.compile(r"([kmgt]?)(i?)b?\Z")
_DEVICE = re.compile(r"([a-z_]+)(?::([0-9]+))?\Z")


@dataclass(frozen=True)
class Bytes:
    """An exact number of bytes."""

    nbytes: int


@dataclass(frozen=True)
class Percent:
    """A share of the model, in percent."""

    percent: Decimal


@dataclass(frozen=True)
class Fraction:
    """A share of the device's own total memory, 0..1."""

    fraction: Decimal


@dataclass(frozen=True)
class Rest:
    """Everything that no other entry takes."""


Share = Bytes | Percent | Fraction | Rest


@dataclass(frozen=True)
class Entry:
    """One entry of a spec. `position` counts from 1; `text` is what was typed, without blanks."""

    device: str
    share: Share
    position: int
    text: str


@dataclass(frozen=True)
class Spec:
    """A parsed placement string. `auto` means that free memory decides."""

    entries: tuple[Entry, ...]
    text: str
    auto: bool = False

    @property
    def is_ratio(self) -> bool:
        """Two or more entries, all percentages: divided by their sum, they place everything."""
        return len(self.entries) >= 2 and all(isinstance(e.share, Percent) for e in self.entries)


class _Where:
    """Where in the string we are, for error messages."""

    def __init__(self, text: str, position: int, entry: str, column: int) -> None:
        self.text, self.position, self.entry, self.column = text, position, entry, column

    def fail(self, problem: str, hint: str) -> NoReturn:
        raise SpecError(
            f"placement {self.text!r}, entry {self.position} ({self.entry.strip()!r}, "
            f"column {self.column}): {problem}; {hint}"
        )


def parse_bytes(text: str | int) -> int:
    """Bytes of "2.5gb", "500mb", "64kb", "7b" (k/m/g/t are powers of 1024) or of an int.

    Raises SpecError.
    """
    number = index(text) if isinstance(text, SupportsIndex) else -1  # an int, or one of numpy's
    if number >= 0 and not isinstance(text, bool):
        return number
    cleaned = _squeezed(str(text))
    where = _Where(str(text), 1, str(text), 1)
    share = _parse_share(cleaned, where)
    if not isinstance(share, Bytes):
        where.fail("not a number of bytes", "write a number and a unit, as in '4gb'")
    return share.nbytes


def parse_spec(text: str) -> Spec:
    """Parses a placement string such as "cuda:0,2.5gb;cpu,*" (or "auto").

    Blanks and case do not matter; one
    semicolon at the end is tolerated. Raises SpecError naming the entry and its position.
    """
    if not isinstance(text, str):
        raise SpecError(
            f"placement: expected a string such as {EXAMPLE!r}, got {type(text).__name__}"
        )
    squeezed = _squeezed(text)
    if squeezed == "auto":
        return Spec((), "auto", auto=True)
    if not squeezed:
        raise SpecError(f"placement {text!r} is empty; expected for example {EXAMPLE!r} or 'auto'")
    entries = tuple(
        _parse_entry(entry, position, column, text)
        for position, (column, entry) in enumerate(_split_entries(text), start=1)
    )
    _check_together(entries, text)
    return Spec(entries, ";".join(entry.text for entry in entries))


def _squeezed(text: str) -> str:
    """Without blanks, in small letters. SpecError on what is too long to be meant."""
    if len(text) > _MOST_TEXT:
        raise SpecError(
            f"{text[:40]!r}... has {len(text)} characters; expected a placement or a number of "
            f"bytes in at most {_MOST_TEXT}, for example {EXAMPLE!r}"
        )
    return re.sub(r"\s+", "", text).lower()


def _split_entries(text: str) -> list[tuple[int, str]]:
    """(column from 1, raw entry); an empty last one (a semicolon at the end) is dropped."""
    found, column = [], 1
    for raw in text.split(";"):
        found.append((column + len(raw) - len(raw.lstrip()), raw))
        column += len(raw) + 1
    if len(found) > 1 and not found[-1][1].strip():
        found.pop()
    return found


def _parse_entry(raw: str, position: int, column: int, text: str) -> Entry:
    where = _Where(text, position, raw, column)
    squeezed = _squeezed(raw)
    if not squeezed:
        where.fail("the entry is empty", "remove the extra ';'")
    parts = squeezed.split(",")
    if len(parts) != 2:
        where.fail(
            f"expected 'device,share', found {len(parts)} part(s)",
            f"write for example {EXAMPLE!r}; entries are separated by ';'",
        )
    device = _parse_device(parts[0], where)
    return Entry(device, _parse_share(parts[1], where), position, squeezed)


def _parse_device(name: str, where: _Where) -> str:
    if "+" in name:  # stripes over several donors
        parts = [_parse_device(part, where) for part in name.split("+")]
        if "disk" in parts:
            where.fail(
                f"{name!r}: weights on disk are not striped",
                "give 'disk' an entry of its own; stripes are for devices and 'cpu'",
            )
        if len(set(parts)) < len(parts):
            where.fail(
                f"{name!r} cannot hold stripes",
                "join different devices or 'cpu' with '+', as in 'cpu+cuda:1'",
            )
        return "+".join(parts)
    match = _DEVICE.fullmatch(name)
    if match and len(match[2] or "") > _MOST_INDEX_DIGITS:
        where.fail(f"{match[1]!r} has an index of {len(match[2])} digits", "no machine has as many")
    kinds = (*HOST_TIERS, *DEVICE_TYPES)
    if match is None:
        where.fail(
            f"{name!r} is not a device",
            "expected 'cpu', 'disk' or a type with an index, as 'cuda:0'",
        )
    kind, number = match.groups()
    if kind not in kinds:
        known = _CALLED.get(kind)
        if known == "cuda":
            known = f"cuda:{number or 0}"
        close = [known] if known else difflib.get_close_matches(kind, kinds, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(kinds)}"
        where.fail(f"unknown device {name!r}", hint)
    if kind in HOST_TIERS:
        if number is not None:
            where.fail(f"{name!r} has an index", f"write {kind!r}: there is one")
        return kind
    return f"{kind}:{int(number or 0)}"


def _parse_share(text: str, where: _Where) -> Share:
    if text == "*":
        return Rest()
    if not text:
        where.fail("the share is missing", "write bytes ('2gb'), a percentage ('25%') or '*'")
    if text.startswith("-"):
        where.fail(f"{text!r} is negative", "a share is 0 or more")
    match = _NUMBER.fullmatch(text)
    if match is None:
        where.fail(
            f"{text!r} is not a share", "expected bytes ('2.5gb'), '25%', a fraction 0..1, or '*'"
        )
    number, unit = Decimal(match[1]), match[2]
    if unit == "%":
        if number > 100_000:
            where.fail(f"{text!r} is no sensible percentage", "expected 0% to 100%")
        return Percent(number)
    if not unit:
        if number > 1:
            where.fail(
                f"the bare number {text} is above 1",
                f"a bare number is a fraction of the device's memory; "
                f"did you mean '{text}gb' or '{text}%'?",
            )
        return Fraction(number)
    return Bytes(_to_bytes(number, unit, text, where))


def _to_bytes(number: Decimal, unit: str, text: str, where: _Where) -> int:
    match = _UNIT.fullmatch(unit)
    if match is None or (match[2] and not match[1]):
        where.fail(f"unknown unit {unit!r} in {text!r}", "units are b, kb, mb, gb, tb and %")
    power = _UNIT_POWERS.get(match[1], 0)
    if len(text) > 40:
        where.fail(f"{text[:20]!r}... has too many digits", "write it in a larger unit")
    return int(number * 1024**power)


def _check_together(entries: tuple[Entry, ...], text: str) -> None:
    seen: dict[str, Entry] = {}
    rest: Entry | None = None
    for entry in entries:
        where = _Where(text, entry.position, entry.text, _column(text, entry.position))
        if entry.device in seen:
            where.fail(
                f"{entry.device!r} was already given in entry {seen[entry.device].position}",
                "name each device once",
            )
        seen[entry.device] = entry
        if isinstance(entry.share, Rest):
            if rest is not None:
                where.fail(
                    f"a second '*' (entry {rest.position} has one)", "one entry takes the rest"
                )
            rest = entry
    _check_percentages(Spec(entries, text), text)


def _column(text: str, position: int) -> int:
    return _split_entries(text)[position - 1][0]


def _check_percentages(spec: Spec, text: str) -> None:
    percentages = [e for e in spec.entries if isinstance(e.share, Percent)]
    total = sum((e.share.percent for e in percentages if isinstance(e.share, Percent)), Decimal(0))
    if not percentages:
        return
    last = percentages[-1]
    where = _Where(text, last.position, last.text, _column(text, last.position))
    if spec.is_ratio:
        if total == 0:
            where.fail("a ratio of zeros places nothing", "give at least one entry more than 0%")
    elif total > 100:
        where.fail(f"the percentages add up to {total}%", "at most 100% of the model can be placed")
