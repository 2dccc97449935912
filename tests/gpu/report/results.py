# SPDX-License-Identifier: Apache-2.0
"""What is known of one item, or of one part of it: a test, a probe, a section of a benchmark."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .runner import Ended

PASSED, FAILED, CRASHED, TIMED_OUT, SKIPPED = "passed", "failed", "crashed", "timed out", "skipped"
STOPPED = "stopped"  # an item, by who runs the report: no failure
BAD = (CRASHED, TIMED_OUT, FAILED)
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')
_SANITIZER = "========="
_FOUND = (f"{_SANITIZER} Invalid", f"{_SANITIZER} Program hit", f"{_SANITIZER} Error:", "E   ")
_MOST_MESSAGE = 600  # characters


@dataclasses.dataclass
class Result:
    """`message` is one line; `text` and `stacks` go to failures.txt; `command` runs it again, for at
    most `limit` seconds if that is told.
    """

    item: str
    status: str
    part: str = ""
    seconds: float = 0.0
    message: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    stacks: str = ""
    command: Sequence[str] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    limit: float | None = None

    @property
    def bad(self) -> bool:
        return self.status in BAD

    @property
    def name(self) -> str:
        return f"{self.item}: {self.part}" if self.part else self.item

    def line(self) -> dict[str, Any]:
        """What results.jsonl says of it."""
        found: dict[str, Any] = {"item": self.item}
        if self.part:
            found["part"] = self.part
        found |= {"status": self.status, "seconds": round(self.seconds, 3)}
        if self.message:
            found["message"] = self.message[:_MOST_MESSAGE]
        if self.details:
            found["details"] = self.details
        return found


def status_of(ended: Ended) -> str:
    if ended.timed_out:
        return TIMED_OUT
    if ended.crashed:
        return CRASHED
    return PASSED if ended.ok else FAILED


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_SANITIZER)]
    return lines[-1] if lines else ""


def found_wrong(log: str) -> str:
    """What a sanitizer or pytest has found, in its first line."""
    for mark in _FOUND:
        for line in log.splitlines():
            if line.startswith(mark) and not line.endswith("%]"):  # pytest's progress
                return line.removeprefix("E ").strip()
    return ""


def result_of(item: str, part: str, ended: Ended, **more: Any) -> Result:
    """Of a process that is judged by how it ended."""
    status = status_of(ended)
    message = "" if status == PASSED else _why(ended)
    return Result(item, status, part, ended.seconds, "; ".join([message, *ended.notes]).strip("; "),
                  text=ended.log if status != PASSED else "", stacks=ended.stacks, **more)  # fmt: skip


def _why(ended: Ended) -> str:
    """The last line tells of an error; the innermost frame, of a crash or of what hangs."""
    if not ended.timed_out and not ended.crashed:
        return f"{ended.how}: {last_line(ended.log)}".rstrip(": ")
    how = f"after {ended.seconds:.0f} s" if ended.timed_out else ended.how
    return f"{how}{innermost(ended.stacks)}"


def innermost(stacks: str) -> str:
    """Where the main thread was, as faulthandler tells it: ", in hang (faults.py:20)"; else ""."""
    block = stacks.partition("Current thread")[2].partition("\n\n")[0]
    frames = _FRAME.findall(block)
    own = [frame for frame in frames if "/lib/python" not in frame[0]]  # not the standard library's
    for path, line, function in (own or frames)[:1]:
        return f", in {function} ({path.rpartition('/')[2]}:{line})"
    return ""


def counted(results: Iterable[Result]) -> dict[str, int]:
    """How many ended how, in the order passed, failed, crashed, timed out, stopped, skipped."""
    found = collections.Counter(result.status for result in results)
    order = (PASSED, FAILED, CRASHED, TIMED_OUT, STOPPED, SKIPPED)
    return {status: found[status] for status in order if found[status]}


def whole(item: str, parts: Sequence[Result], seconds: float) -> Result:
    """An item's own line: as bad as the worst of its parts."""
    if not parts:
        return Result(item, FAILED, seconds=seconds, message="it gave no result")
    counts = counted(parts)
    status = next((bad for bad in BAD if bad in counts), PASSED)
    if set(counts) == {SKIPPED}:
        status = SKIPPED
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    if len(parts) == 1:
        words = parts[0].message or words
    return Result(item, status, seconds=seconds, message=words, details={"counts": counts})
