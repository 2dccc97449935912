# SPDX-License-Identifier: Apache-2.0
"""The last of the seven files, which is also printed: what an owner reads first."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from .reruns import ITEM as RERUNS
from .reruns import grouped
from .results import SKIPPED, STOPPED, Result, counted

_MOST_GROUPS, _MOST_SKIPS = 15, 8
_MOST_LINE, _MOST_TEXT, _TAIL = 120, 700, 200  # characters


def told(report: Any, facts: Mapping[str, Any], done: bool) -> str:
    sections = [
        _head(report, facts, done), _items(report), _failures(report), _reruns(report),
        _probes(report), _benchmark(report), _skipped(report),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(report: Any, facts: Mapping[str, Any], done: bool) -> str:
    gpus = facts.get("gpus")
    cards = "; ".join(
        f"{gpu.get('name')}, driver {gpu.get('driver_version')}" for gpu in gpus
    ) if isinstance(gpus, list) else ""  # fmt: skip
    packages = facts.get("packages") or {}
    torch = facts.get("torch", packages.get("torch"))
    lines = [
        f"distorch on {'a GPU' if report.device == 'cuda' else 'the simulated accelerator'}: "
        + ("a report" if done else "a report that is not finished"),
        f"card     {cards or 'none'}",
        f"memory   {_memory(facts)}",
        f"versions Python {facts.get('python')}, torch {torch}, commit {facts.get('commit')}",
        f"place    {'; '.join(report.workplace.notes)}",
        *_without_kernels(report, facts),
        f"time     {report.schedule.spent():.0f} s of {report.schedule.seconds:.0f} s",
    ]
    return "\n".join(map(_cut, lines))


def _memory(facts: Mapping[str, Any]) -> str:
    gpus = facts.get("gpus")
    found = [f"{gpu.get('memory.free')} of {gpu.get('memory.total')} free on a card"
             for gpu in (gpus if isinstance(gpus, list) else [])]  # fmt: skip
    free, total = facts.get("memory, available"), facts.get("memory")
    if isinstance(free, int) and isinstance(total, int):
        found.append(f"{free / 1e9:.0f} of {total / 1e9:.0f} GB of RAM free")
    return "; ".join(found)


def _without_kernels(report: Any, facts: Mapping[str, Any]) -> list[str]:
    if report.device == "cuda" and facts.get("kernels for CUDA") is False:
        return ["kernels  kernels for CUDA: false. Quantised weights on the device do not work"]
    return []


def _items(report: Any) -> str:
    lines = ["items"]
    for result in report.whole:
        lines.append(
            _cut(f"  {result.name:18} {result.status:10} {result.seconds:5.0f} s  {result.message}")
        )
    return "\n".join(lines)


def _cut(line: str) -> str:
    """A long line goes on below. Of a very long one, head and tail: errors tell their cause last."""
    indent = line[: len(line) - len(line.lstrip())]
    words = " ".join(line.split("\n")).strip()
    if len(words) > _MOST_TEXT:
        head, tail = words[: _MOST_TEXT - _TAIL], words[-_TAIL:]
        words = f"{head.rpartition(' ')[0] or head} … {tail.partition(' ')[2] or tail}"
    return textwrap.fill(
        words, _MOST_LINE, initial_indent=indent, subsequent_indent=indent + "    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def parts(report: Any) -> list[Result]:
    """Tests, probes, sections; and items that ran without any."""
    items_with_parts = {result.item for result in report.results if result.part}
    return [r for r in report.results
            if r.part or (r.item not in items_with_parts and r.status not in (SKIPPED, STOPPED))]  # fmt: skip


def _failures(report: Any) -> str:
    groups = grouped(part for part in parts(report) if part.item != "health")
    if not groups:
        until = " until it was stopped" if any(r.status == STOPPED for r in report.whole) else ""
        return f"nothing failed{until}" if report.ran else "nothing ran"
    lines = ["failures, by message (stacks and texts: failures.txt)"]
    for group in groups[:_MOST_GROUPS]:
        first = group[0]
        lines.append(_cut(f"  {len(group):3} x {first.status}: {first.message or '(no message)'}"))
        lines.append(_cut(f"        {first.name}"))
    if len(groups) > _MOST_GROUPS:
        lines.append(f"  and {len(groups) - _MOST_GROUPS} other messages")
    return "\n".join(lines)


def _reruns(report: Any) -> str:
    found = [r for r in report.results if r.item in (RERUNS, "health") and r.part]
    lines = [
        _cut(f"  {r.item}: {r.part}: {r.status}{': ' + _words(r.message) if r.message else ''}")
        for r in found
    ]
    return "\n".join(["after failures", *lines]) if lines else ""


def _words(message: str) -> str:
    """Health tells JSON."""
    try:
        return _short(json.loads(message)) if message.startswith("{") else message
    except ValueError:
        return message


def _probes(report: Any) -> str:
    lines = []
    for result in report.results:
        if result.item == "probes" and result.details and result.part:
            lines += _lines(result.part, result.details, "  ")
    return "\n".join([f"probes{_simulated(report)}", *lines]) if lines else ""


def _simulated(report: Any) -> str:
    return "" if report.device == "cuda" else " (simulated: says nothing about a GPU)"


def _lines(name: str, value: Any, indent: str) -> list[str]:
    """One line, or one for each entry where that would be too long."""
    whole = f"{indent}{name}: {_short(value, _unit(name))}"
    if len(whole) <= _MOST_LINE or not isinstance(value, dict):
        return [_cut(whole)]
    inner = [line for key, each in value.items() for line in _lines(key, each, indent + "  ")]
    return [f"{indent}{name}", *inner]


def _short(value: Any, unit: str = "") -> str:
    """Numbers with three digits, in units that people read; "bytes_per_s" is told by the name."""
    if isinstance(value, bool) or not isinstance(value, (dict, int, float)):
        return value if isinstance(value, str) else json.dumps(value, default=str)
    if isinstance(value, dict):
        return "; ".join(
            f"{key}: {_within(inner, _unit(key) or unit)}" for key, inner in value.items()
        )
    if unit == "bytes_per_s":
        return f"{value / 1e9:.3g} GB/s"
    if unit == "bytes":
        return f"{value / 1e6:.4g} MB"
    if unit == "s":
        return f"{1e3 * value:.4g} ms" if value >= 1e-4 else f"{1e6 * value:.4g} µs"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _within(value: Any, unit: str) -> str:
    text = _short(value, unit)
    return f"({text})" if isinstance(value, dict) else text


def _unit(key: Any) -> str:
    name = str(key)
    for unit in ("bytes_per_s", "bytes"):
        if name.endswith(unit):
            return unit
    return "s" if name.endswith("_s") or name == "seconds" else ""


def _benchmark(report: Any) -> str:
    """Every row of every section, as short as can be."""
    lines = []
    for section, rows in report.benchmark.items():
        if isinstance(rows, list) and section != "done":
            lines.append(f"  {section}")
            lines += [_cut(f"    {_short(row)}") for row in rows]
    return "\n".join([f"benchmark{_simulated(report)}", *lines]) if lines else ""


def _skipped(report: Any) -> str:
    """How many parts were skipped, and why."""
    reasons: dict[str, int] = {}
    without = [result for result in report.whole if not result.details]  # of parts
    for result in [*without, *(r for r in parts(report) if r not in without)]:
        if result.status == SKIPPED:
            reason = f"{result.item}: {result.message}"
            reasons[reason] = reasons.get(reason, 0) + 1
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])[:_MOST_SKIPS]
    return (
        "\n".join(["skipped", *(_cut(f"  {n:3} x {reason}") for reason, n in ordered)])
        if ordered
        else ""
    )


def last_words(report: Any) -> str:
    """Items; and what they consist of, which is what junit.xml counts."""
    of_items = _told(counted(report.whole))
    of_parts = _told(counted(r for r in parts(report) if r.item not in (RERUNS, "health")))
    return f"items: {of_items}; tests, probes and sections: {of_parts or 'none'}"


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())
