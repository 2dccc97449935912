"""The seven files that are sent in. They are written as the report goes on.

A report that is killed leaves what it had. No file grows beyond the cap: a log may take a quarter
of the room that is left, so that there is always some for the next.
"""

from __future__ import annotations

import json
import os
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
LARGEST = 16 << 20  # bytes
_MOST_TEXT = 16 << 10  # of one failure; its stacks may take four times as much
_TAGS = {FAILED: "failure", CRASHED: "error", TIMED_OUT: "error"}


class Pack:
    """A folder with exactly these files."""

    def __init__(self, folder: Path, largest: int = LARGEST) -> None:
        self._folder = folder
        self._largest = largest
        self._lock = threading.Lock()  # of the files: logs come from several threads
        folder.mkdir(parents=True, exist_ok=True)
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
        most = min(_MOST_TEXT, self._room(FAILURES) // 8)
        text = f"{result.status}: {result.message}\n\n{middle_out(result.text, most)}\n"
        if result.stacks:
            text += f"\nstacks:\n{middle_out(result.stacks, 4 * most)}\n"
        self._append(FAILURES, _entry(result.name, text, 6 * most))

    def facts(self, facts: Mapping[str, Any]) -> None:
        self._replace(FACTS, self._json(facts))

    def benchmark(self, found: Mapping[str, Any]) -> None:
        self._replace(BENCHMARK, self._json(found))

    def summary(self, text: str) -> None:
        self._replace(SUMMARY, middle_out(text, self._largest // 2))

    def junit(self, results: Iterable[Result]) -> None:
        """What CI systems read. It holds as many tests as fit."""
        head = '<?xml version="1.0" encoding="utf-8"?>\n<testsuites><testsuite name="gpu-report">\n'
        tail = "</testsuite></testsuites>\n"
        cases, size = [], len(head) + len(tail)
        for result in results:
            case = _case(result)
            size += len(case.encode())
            if size < self._largest:
                cases.append(case)
        self._replace(JUNIT, head + "".join(cases) + tail)

    def _room(self, name: str) -> int:
        return self._largest - (self._folder / name).stat().st_size

    def _append(self, name: str, text: str) -> None:
        with self._lock, (self._folder / name).open("a", errors="replace") as file:
            if len(text.encode(errors="replace")) > self._room(name):
                return
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, name: str, text: str) -> None:
        """At one blow: who kills the report finds the old file or the new one."""
        part = self._folder / f".{name}"
        part.write_text(text, errors="replace")
        part.replace(self._folder / name)

    def _json(self, found: Mapping[str, Any]) -> str:
        text = json.dumps(found, indent=1, default=str) + "\n"
        if len(text.encode()) > self._largest:
            return json.dumps({"left out": f"{len(text)} bytes"}) + "\n"
        return text


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
