# SPDX-License-Identifier: Apache-2.0
"""The seven files that are sent in. They are written as the report goes on.

A report that is killed leaves what it had. No file grows beyond the cap: a log may take a quarter
of the room that is left, so that there is always some for the next.
"""

from __future__ import annotations

import collections
import fcntl
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from .logs import CAP, middle_out
from .results import CRASHED, FAILED, SKIPPED, TIMED_OUT, Result

FACTS, RESULTS, JUNIT = "facts.json", "results.jsonl", "junit.xml"
LOGS, BENCHMARK, FAILURES, SUMMARY = "logs.txt", "benchmark.json", "failures.txt", "summary.txt"
NAMES = (FACTS, RESULTS, JUNIT, LOGS, BENCHMARK, FAILURES, SUMMARY)
EARLIER = "earlier"  # where an earlier report's files go
LARGEST = 16 << 20  # bytes
_MOST_TEXT = 16 << 10  # of one failure; its stacks may take four times as much
_TAGS = {FAILED: "failure", CRASHED: "error", TIMED_OUT: "error", SKIPPED: "skipped"}


class Pack:
    """A folder with exactly these files. OSError: it cannot be made, or is another report's.

    `private` says what is written instead of paths that nobody needs to know.
    """

    def __init__(
        self, folder: Path, largest: int = LARGEST, private: Mapping[str, str] | None = None
    ) -> None:
        self._folder = folder
        self._largest = largest
        self._lock = threading.Lock()  # of the files: logs come from several threads
        self._private = [
            (re.compile(re.escape(path) + r"(?![\w.-])"), instead)
            for path, instead in (private or {}).items()
        ]
        self._index: list[str] = []
        self._finished = False
        folder.mkdir(parents=True, exist_ok=True)
        self._held = held(folder)
        _set_aside(folder)
        for name in NAMES:
            (folder / name).write_text("")
        self.facts({})
        self.benchmark({})
        self.junit([])

    def result(self, result: Result) -> None:
        """One line, on the disk before anything else starts."""
        line = json.dumps(result.line(), default=str) + "\n"
        if self._room(RESULTS) > len(line.encode()):
            self._append(RESULTS, line)

    def log(self, title: str, text: str) -> None:
        self._append(LOGS, _entry(title, text, min(2 * CAP, self._room(LOGS) // 4)))

    def failure(self, result: Result) -> None:
        self._index.append(_line(f"{result.name}: {result.status}: {result.message}"))
        most = min(_MOST_TEXT, self._room(FAILURES) // 8)
        text = f"{result.status}: {result.message}\n\n{middle_out(result.text, most)}\n"
        if result.stacks:
            text += f"\nstacks:\n{middle_out(result.stacks, 4 * most)}\n"
        self._append(FAILURES, _entry(result.name, text, 6 * most))

    def finish(self) -> None:
        """An index before the failures, once."""
        if self._finished:
            return
        self._finished = True
        lines = [f"{len(self._index)} failures", *self._index, "", ""]
        index = middle_out("\n".join(lines), self._largest // 8)
        body = (self._folder / FAILURES).read_text(errors="replace")
        most = self._largest - len(index.encode(errors="replace")) - 100
        text = index + middle_out(body, most) if self._index else "nothing failed\n"
        self._replace(FAILURES, text)

    def facts(self, facts: Mapping[str, Any]) -> None:
        self._replace(FACTS, self._json(facts))

    def benchmark(self, found: Mapping[str, Any]) -> None:
        self._replace(BENCHMARK, self._json(found))

    def summary(self, text: str) -> None:
        self._replace(SUMMARY, middle_out(text, self._largest // 2))

    def junit(self, results: Iterable[Result]) -> None:
        """What CI systems read. It holds as many tests as fit."""
        tail = "</testsuite></testsuites>\n"
        cases, kept, size = [], [], 1000
        for result in results:
            case = _case(result)
            size += len(case.encode())
            if size < self._largest:
                cases.append(case)
                kept.append(result)
        tags = collections.Counter(_TAGS.get(result.status) for result in kept)
        head = (
            '<?xml version="1.0" encoding="utf-8"?>\n<testsuites><testsuite name="gpu-report" '
            f'tests="{len(kept)}" failures="{tags["failure"]}" errors="{tags["error"]}" '
            f'skipped="{tags["skipped"]}" time="{sum(r.seconds for r in kept):.3f}">\n'
        )
        self._replace(JUNIT, head + "".join(cases) + tail)

    def _room(self, name: str) -> int:
        return self._largest - (self._folder / name).stat().st_size

    def _append(self, name: str, text: str) -> None:
        text = self._public(text)
        with self._lock, (self._folder / name).open("a", errors="replace") as file:
            if len(text.encode(errors="replace")) > self._room(name):
                return
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, name: str, text: str) -> None:
        """At one blow: who kills the report finds the old file or the new one."""
        part = self._folder / f".{name}"
        part.write_text(self._public(text), errors="replace")
        part.replace(self._folder / name)

    def _public(self, text: str) -> str:
        for pattern, instead in self._private:
            text = pattern.sub(instead, text)
        return text

    def _json(self, found: Mapping[str, Any]) -> str:
        text = json.dumps(found, indent=1, default=str) + "\n"
        if len(text.encode()) > self._largest:
            return json.dumps({"left out": f"{len(text)} bytes"}) + "\n"
        return text


def held(folder: Path) -> int:
    """A lock on the folder, for as long as this process lives: two reports would mix their files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f"another report is writing into {folder}: give another --out") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _set_aside(folder: Path) -> None:
    """An earlier report's files go into a folder of their own."""
    files = [folder / name for name in NAMES if (folder / name).exists()]
    if files:
        names = (f"{EARLIER}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
        aside = next(folder / name for name in names if not (folder / name).exists())
        aside.mkdir()
        for file in files:
            file.replace(aside / file.name)


def _line(text: str) -> str:
    return "  " + " ".join(middle_out(text, 300).split())


def _entry(title: str, text: str, most: int) -> str:
    return f"{'=' * 78}\n{title}\n{'=' * 78}\n{middle_out(text, most).rstrip()}\n\n"


def _case(result: Result) -> str:
    file, _, name = result.part.partition("::")
    where = f"{result.item}.{file}" if name else result.item
    head = (f"<testcase classname={_attribute(where)} name={_attribute(name or file or 'item')} "
            f'time="{result.seconds:.3f}"')  # fmt: skip
    if result.status == SKIPPED:
        return f"{head}><skipped message={_attribute(result.message)}/></testcase>\n"
    if result.status not in _TAGS:
        return f"{head}/>\n"
    tag = _TAGS[result.status]
    text = escape(_printable(middle_out(result.text or result.stacks, 8 << 10)))
    message = _attribute(f"{result.status}: {result.message}")
    return f"{head}><{tag} message={message}>{text}</{tag}></testcase>\n"


def _attribute(text: str) -> str:
    return quoteattr(_printable(text))


def _printable(text: str) -> str:
    """Without the control characters that XML forbids."""
    return "".join(c if c >= " " or c in "\n\t" else "?" for c in text)
