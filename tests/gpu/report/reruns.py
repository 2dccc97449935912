"""Failures again, one of each kind: with blocking launches, then under memcheck."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from . import sanitizer
from .results import SKIPPED, Result, result_of

ITEM = "reruns"
_LEAST_S, _MOST_S = 4.0, 20.0
_NOISE = (
    (re.compile(r"0x[0-9a-fA-F]+"), "0x…"),
    (re.compile(r"(/[\w.+-]+){2,}"), "/…"),
    (re.compile(r"\d+(\.\d+)?"), "#"),
    (re.compile(r"\s+"), " "),
)


def kind_of(message: str) -> str:
    """A message without what differs from run to run: addresses, numbers, paths."""
    for pattern, instead in _NOISE:
        message = pattern.sub(instead, message)
    return message.strip()


def grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Bad results by the kind of their message, the largest group first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.bad and result.item != ITEM:
            groups.setdefault(kind_of(f"{result.status}: {result.message}"), []).append(result)
    return sorted(groups.values(), key=len, reverse=True)


def rerun(report: Any, limit: float) -> None:
    """One of each group that can be run again, until the time is up."""
    until = time.monotonic() + limit
    cases = [
        next((result for result in group if result.command), None)
        for group in grouped(report.results)
    ]
    for case in filter(None, cases):
        for how, command, env in _ways(report.device, case):
            part = f"{case.name} ({how})"
            left = min(_MOST_S, until - time.monotonic())
            if left < _LEAST_S:
                report.add(Result(ITEM, SKIPPED, part, message="the item's time was up"))
                continue
            ended = report.run(f"{ITEM}: {part}", command, left, {**case.env, **env})
            report.add(result_of(ITEM, part, ended))
    if not any(cases):
        report.add(Result(ITEM, SKIPPED, message="nothing that failed can be run again"))


def _ways(device: str, case: Result) -> list[tuple[str, list[str], dict[str, str]]]:
    command = list(case.command)
    if device == "sim":
        return [("again", command, {})]
    ways = [("blocking launches", command, {"CUDA_LAUNCH_BLOCKING": "1"})]
    memcheck = sanitizer.command("--tool", "memcheck")
    if memcheck:
        ways.append(("memcheck", [*memcheck, *command], {}))
    return ways
