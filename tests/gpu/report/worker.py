# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: this process runs the tests that it is told to, one by one.

It collects once, tells the node ids, and then reads them from a pipe. It writes a line of JSON when a
test begins and one when it ends, so that the report knows which test took the process down.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from .child import CHANNEL, DEVICE

SICK = 77  # the exit status after a failure that the device has not survived
_MOST_TEXT = 20_000  # characters of a failure, or of what a test has printed


class Worker:
    """One per process; `reports` are those of the test that runs, or of collecting."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        for number in (incoming, outgoing):
            os.set_inheritable(number, False)
        self._incoming = os.fdopen(incoming)
        self._outgoing = os.fdopen(outgoing, "w", buffering=1)
        self.reports: list[Any] = []

    def tell(self, **line: Any) -> None:
        self._outgoing.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.reports.append(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        errors = {r.nodeid or "collection": str(r.longrepr)[-_MOST_TEXT:] for r in self.reports}
        items = {item.nodeid: item for item in session.items}
        self.tell(collected=list(items), errors=errors)
        self.tell(ready=True)
        for line in self._incoming:
            self._run(items[line.rstrip("\n")])
        return True

    def _run(self, item: Any) -> None:
        self.reports = []
        self.tell(begin=item.nodeid)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        outcome = _outcome(self.reports)
        self.tell(end=item.nodeid, **outcome)
        if outcome["status"] == "failed":
            trouble = device_trouble()
            if trouble:
                self.tell(sick=trouble)
                os._exit(SICK)  # what is left of this process would only fail
        self.tell(ready=True)


def _outcome(reports: list[Any]) -> dict[str, Any]:
    failed = [report for report in reports if report.failed]
    skipped = [report for report in reports if report.skipped]
    found = {"seconds": sum(report.duration for report in reports), "message": "", "text": ""}
    if failed:
        first = failed[0]
        printed = "\n".join(
            f"--- {name} ---\n{text[-_MOST_TEXT:]}" for name, text in first.sections
        )
        text = f"{str(first.longrepr)[-_MOST_TEXT:]}\n{printed[-_MOST_TEXT:]}"
        return {**found, "status": "failed", "message": _message(first), "text": text}
    if skipped:
        reason = skipped[0].longrepr
        words = reason[2] if isinstance(reason, tuple) else str(reason)
        return {**found, "status": "skipped", "message": words.removeprefix("Skipped: ")}
    return {**found, "status": "passed"}


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = text.strip().splitlines() or [""]
    return (f"in {report.when}: " if report.when != "call" else "") + lines[0][:500]


def device_trouble() -> str:
    """What the device says if it no longer works for this process: a sticky error, a lost device."""
    import torch

    device = torch.device(os.environ.get(DEVICE, "cuda"), 0)
    try:
        torch.get_device_module(device).synchronize()
        if (torch.ones(8).to(device) + 1).sum().item() != 16:
            return "the device gave a wrong sum"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def pytest_configure(config: Any) -> None:
    # Tests that start pytest themselves must not inherit the pipe.
    incoming, outgoing = map(int, os.environ.pop(CHANNEL).split(","))
    config.pluginmanager.register(Worker(incoming, outgoing), "distorch-report-worker")
