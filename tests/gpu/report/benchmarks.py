# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py, section by section. Its JSON is read whatever is in it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import FAILED, PASSED, SKIPPED, Result, result_of
from .runner import Ended, Watched

PROGRAM = "benchmarks/gpu.py"
_LEAST_S = 8.0  # of use to a section
_QUIET_S = 45.0  # without a new row, the process's start included
_OURS = ("distorch", "resident")  # systems that must not fail


def measured(report: Any, item: str, sections: Sequence[str], limit: float) -> None:
    """One process for all of them, so that a model is made once; a new one after a failure."""
    until = time.monotonic() + limit
    left = list(sections)
    while left and until - time.monotonic() >= _LEAST_S:
        ended, found = _run(report, item, left, until - time.monotonic())
        report.benchmark |= found
        report.pack.benchmark(report.benchmark)
        done = [section for section in left if section in found.get("done", [])]
        for section in done:
            report.add(_judged(item, section, found.get(section)))
        left = [section for section in left if section not in done]
        if left:
            report.add(_failed(item, left.pop(0), ended))
        elif not ended.ok:
            report.add(result_of(item, "at exit", ended))
    for section in left:
        report.add(Result(item, SKIPPED, section, message="the item's time was up"))


def _run(report: Any, item: str, sections: list[str], limit: float) -> tuple[Ended, dict[str, Any]]:
    path = report.scratch / "benchmark.json"  # one for all: overlap takes the link's rate from it
    command = [sys.executable, "-m", "tests.gpu.report.child", PROGRAM, "--device", report.device,
               "--json", str(path), "--only", *sections]  # fmt: skip
    if report.device == "sim":
        command += ["--rounds", "1"]
    # Rows come every few seconds. One that hangs must not take the time of the sections after it.
    watched = Watched(path, _QUIET_S)
    ended = report.run(f"{item}: {' '.join(sections)}", command, limit, watched=watched)
    return ended, _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {"found": found}


def _judged(item: str, section: str, rows: Any) -> Result:
    """A section that ended. It has failed where a row of ours, or every row, is an error.

    Another system may refuse the model, or not be installed: its row says so, and is no failure.
    """
    rows = rows if isinstance(rows, list) else []
    wrong = [row for row in rows if row.get("error")]
    ours = [row for row in wrong if str(row.get("system", "distorch")).startswith(_OURS)]
    if ours or (wrong and len(wrong) == len(rows)):
        told = (ours or wrong)[0]
        name = f"{told['system']}: " if "system" in told else ""
        return Result(item, FAILED, section, message=f"{name}{told['error']}")
    return Result(item, PASSED, section)


def _failed(item: str, section: str, ended: Ended) -> Result:
    """The first section that did not end is the one that failed: they run in this order."""
    result = result_of(item, section, ended)
    if result.status == PASSED:
        result.status = FAILED
    return result
