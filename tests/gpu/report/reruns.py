# SPDX-License-Identifier: Apache-2.0
"""Failures again, one of each kind: with blocking launches, then under memcheck."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import sanitizer
from .results import SKIPPED, TIMED_OUT, Result, found_wrong, result_of

ITEM = "reruns"
_LEAST_S, _AGAIN_S, _MEMCHECK_S = 4.0, 15.0, 40.0
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
    """Bad results by the kind of their message: the largest group first, what hangs after others."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.bad and result.item != ITEM:
            groups.setdefault(kind_of(f"{result.status}: {result.message}"), []).append(result)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0].status == TIMED_OUT))


def rerun(report: Any, limit: float) -> None:
    """One of each group that can be run again: with blocking launches, then under memcheck."""
    until = time.monotonic() + limit
    cases = [next((r for r in group if r.command), None) for group in grouped(report.results)]
    known = [case for case in cases if case is not None]
    if not known:
        report.add(Result(ITEM, SKIPPED, message="nothing has failed that can be run again"))
        return
    # What hangs may take all of the time, so it comes last.
    hanging = [case for case in known if case.status == TIMED_OUT]
    known = [case for case in known if case.status != TIMED_OUT]
    _side_by_side(report, _again(report.device, known), until)
    memcheck = sanitizer.command("--tool", "memcheck")
    if memcheck and report.device == "cuda":
        under = [Way(case, "memcheck", [*memcheck, *case.command], {}, _MEMCHECK_S)
                 for case in known]  # fmt: skip
        _side_by_side(report, under, until)
    _side_by_side(report, _again(report.device, hanging), until)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a failure is run again."""

    case: Result
    how: str
    command: Sequence[str]
    env: Mapping[str, str]
    most: float  # seconds


def _again(device: str, cases: Sequence[Result]) -> list[Way]:
    if device == "sim":
        return [Way(case, "again", case.command, {}, _AGAIN_S) for case in cases]
    env = {"CUDA_LAUNCH_BLOCKING": "1"}
    return [
        Way(case, "blocking launches", case.command, env, case.limit or _AGAIN_S) for case in cases
    ]


def _side_by_side(report: Any, ways: Sequence[Way], until: float) -> None:
    def one(way: Way) -> Result:
        part = f"{way.case.name} ({way.how})"
        left = min(way.most, until - time.monotonic())
        if left < _LEAST_S:
            return Result(ITEM, SKIPPED, part, message="the item's time was up")
        env = {**way.case.env, **way.env}
        ended = report.run(f"{ITEM}: {part}", way.command, left, env)
        result = result_of(ITEM, part, ended)
        result.message = found_wrong(ended.log) or result.message
        return result

    with concurrent.futures.ThreadPoolExecutor(
        report.side_by_side(min(4, report.options.jobs))
    ) as threads:
        for result in threads.map(one, ways):
            report.add(result)
