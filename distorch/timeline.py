# SPDX-License-Identifier: Apache-2.0
"""What ran when, as `trace` recorded it: a table, a picture, and a file for Perfetto."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distorch._small_files import MOST_TRACE, read_json, write_atomically
from distorch.display.picture import Picture
from distorch.display.tables import html_table, human_bytes, text_table
from distorch.display.timelines import (
    COPY,
    FETCHED,
    OTHER,
    READ,
    STALL,
    Panel,
    Piece,
    timeline_picture,
)  # fmt: skip
from distorch.errors import FormatError

_WRITER = "distorch"
_HEADER = ("track", "spans", "busy ms", "of the time", "bytes", "GB/s")
# The first word of a track -> colour, and what a legend says.
_KINDS = {
    "compute": (FETCHED, "operator on a sharded weight"),
    "copies": (COPY, "copy of a weight"),
    "reads": (READ, "read of a file"),
    "stalls": (STALL, "stall: an operator waits for its weight"),
}
_OTHER = (OTHER, "other")
_GAPS = (
    "A gap on a compute track need not be idle time: operators on resident weights are "
    "not recorded."
)


class Span(NamedTuple):
    """One piece of work: seconds since the trace began; `bytes` is 0 where none travelled."""

    track: str
    name: str
    start: float
    end: float
    bytes: int


@dataclass(repr=False)
class Timeline:
    """What ran when. It prints as a table, and `plot` draws it.

    Attributes:
        spans: A `Span` (track, name, start, end, bytes) for each piece of work. Times are seconds.
            A track is a stream, a link or a kind of work, such as "copies cpu->cuda:0". `trace`
            fills the list when its block ends.
    """

    spans: list[Span] = field(default_factory=list)

    @property
    def tracks(self) -> dict[str, list[Span]]:
        """Track -> its spans by their start; the tracks in the order of their names."""
        found: dict[str, list[Span]] = {name: [] for name in sorted({s.track for s in self.spans})}
        for span in sorted(self.spans, key=lambda span: span.start):
            found[span.track].append(span)
        return found

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        starts, ends = [s.start for s in self.spans], [s.end for s in self.spans]
        return max(ends, default=0.0) - min(starts, default=0.0)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """A row for each track, milliseconds to the right.

        With a `path` it is also saved there, with the errors of `Picture.save`.
        """
        begin = min((span.start for span in self.spans), default=0.0)
        rows = [
            (track, [_piece(span, begin) for span in spans]) for track, spans in self.tracks.items()
        ]
        used = dict.fromkeys(_kind(track) for track in self.tracks)
        title = self._title()
        made = timeline_picture(
            title, [Panel(title, rows)], list(used), "milliseconds", [_GAPS] * bool(rows)
        )
        return made if path is None else made.saved(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace as JSON for ui.perfetto.dev and chrome://tracing.

        Raises:
            OSError: The file cannot be written. An older one is unchanged.
        """
        content = {"traceEvents": self._events(), "otherData": {"writer": _WRITER}}
        write_atomically(Path(path), json.dumps(content))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Timeline:
        """Reads what `trace` or `save` wrote.

        Raises:
            FormatError: The file is not there, damaged, or of another program.
        """
        try:
            content = read_json(path, MOST_TRACE)
        except OSError as error:
            raise FormatError(f"cannot read the trace {str(path)!r}: {error.strerror}") from error
        except ValueError as error:
            raise FormatError(
                f"{str(path)!r}: expected a trace that distorch.trace wrote, found no JSON"
            ) from error
        told = content.get("otherData") if isinstance(content, dict) else None
        if not isinstance(told, dict) or told.get("writer") != _WRITER:
            found = f"a JSON {type(content).__name__}"
            if isinstance(content, list) or (
                isinstance(content, dict) and "traceEvents" in content
            ):
                found = "a trace of another program"
            raise FormatError(
                f"{str(path)!r}: expected a trace that distorch.trace wrote, found {found}. "
                "ui.perfetto.dev opens traces of all programs"
            )
        try:
            return cls(list(_spans(content["traceEvents"])))
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise FormatError(
                f"the trace {str(path)!r} is damaged; record it again with distorch.trace "
                f"({type(error).__name__}: {error})"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Track -> spans, busy seconds and bytes, as JSON types."""
        tracks = {
            name: {
                "spans": len(own),
                "busy_seconds": _busy(own),
                "bytes": sum(s.bytes for s in own),
            }
            for name, own in self.tracks.items()
        }
        return {"seconds": self.seconds, "tracks": tracks}

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, spans in self.tracks.items():
            busy, nbytes = _busy(spans), sum(span.bytes for span in spans)
            rows.append(
                (
                    name, str(len(spans)), f"{busy * 1e3:.3f}",
                    f"{100 * busy / max(self.seconds, 1e-12):.1f}%",
                    human_bytes(nbytes) if nbytes else "",
                    f"{nbytes / max(busy, 1e-12) / 1e9:.2f}" if nbytes else "",
                )
            )  # fmt: skip
        return rows

    def _title(self) -> str:
        if not self.spans:
            return "nothing was recorded: no sharded weight was used, or the block has not ended"
        return f"{self.seconds * 1e3:.2f} ms"

    def __str__(self) -> str:
        if not self.spans:
            return self._title()
        return text_table(_HEADER, self._rows(), self._title()) + f"\n{_GAPS}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.spans:
            return f"<p>{html.escape(self._title())}</p>"
        return html_table(_HEADER, self._rows(), self._title()) + self.plot().svg()

    def _events(self) -> list[dict[str, object]]:
        """Complete events in microseconds, a row for each track."""
        events: list[dict[str, object]] = []
        for row, (track, spans) in enumerate(self.tracks.items(), start=1):
            events.append({"ph": "M", "pid": 1, "tid": row, "name": "thread_name",
                           "args": {"name": track}})  # fmt: skip
            events += [
                {"ph": "X", "pid": 1, "tid": row, "name": span.name, "ts": span.start * 1e6,
                 "dur": (span.end - span.start) * 1e6, "args": _details(span)}
                for span in spans
            ]  # fmt: skip
        return events


def _details(span: Span) -> dict[str, object]:
    if not span.bytes:
        return {}
    rate = span.bytes / max(span.end - span.start, 1e-12) / 1e9
    return {"bytes": span.bytes, "GB/s": round(rate, 3)}


def _spans(events: list[dict[str, Any]]) -> Iterable[Span]:
    rows = {e["tid"]: str(e["args"]["name"]) for e in events if e["ph"] == "M"}
    for event in events:
        if event["ph"] != "X":
            continue
        start, took = event["ts"] / 1e6, event["dur"] / 1e6
        if not (math.isfinite(start) and 0 <= took < math.inf):
            raise ValueError(f"a span from {start} that takes {took} seconds")
        nbytes = int(event["args"].get("bytes", 0))
        if not 0 <= nbytes < 1 << 63:
            raise ValueError("a span of a number of bytes that there cannot be")
        yield Span(rows[event["tid"]], str(event["name"]), start, start + took, nbytes)


def _kind(track: str) -> tuple[str, str]:
    """Colour and words of a track."""
    return _KINDS.get(track.split(" ", maxsplit=1)[0], _OTHER)


def _piece(span: Span, begin: float) -> Piece:
    took = f"{(span.end - span.start) * 1e3:.3f} ms"
    size = f", {human_bytes(span.bytes)}" if span.bytes else ""
    title = f"{span.name}: {took}{size}"
    return Piece(span.start - begin, span.end - begin, _kind(span.track)[0], title)


def _busy(spans: list[Span]) -> float:
    """Seconds in which at least one of them ran; they are in the order of their starts."""
    busy, until = 0.0, -math.inf
    for span in spans:
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy
