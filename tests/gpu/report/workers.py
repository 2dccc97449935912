# SPDX-License-Identifier: Apache-2.0
"""Tests in parallel: several pytest processes, replaced when a test takes one of them down."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import stacks
from .child import CHANNEL
from .processes import Child
from .results import CRASHED, FAILED, PASSED, SKIPPED, TIMED_OUT, Result, innermost, last_line
from .runner import told

PYTEST = (sys.executable, "-m", "tests.gpu.report.child", "-m", "pytest", "-q",
          "-p", "no:cacheprovider", "-p", "no:faulthandler")  # fmt: skip
_START_S = 60.0  # to import and to collect
_MOST_LOST = 3  # workers that end before they have collected
_MOST_SICK = 6  # workers in a row that lose the device with their first test
LONG = (
    "compile",
    "overhead",
    "malloc_async",
    "exit_code",
)  # the compiler, or processes of their own
_FIRST = (*LONG, "expandable")  # these take long: started first


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is run: arguments of pytest, in which environment, how long one test may take."""

    item: str
    arguments: Sequence[str]
    env: Mapping[str, str]
    more: Mapping[str, str]  # of the environment, for who runs a test of it again
    cwd: Path
    scratch: Path
    label: str = ""
    limit: Callable[[str], float] = lambda _: 40.0


class Worker:
    """One of the processes, and what it is doing."""

    def __init__(self, suite: Suite) -> None:
        theirs, self._orders = os.pipe()
        self._lines, mine = os.pipe()
        env = {**suite.env, CHANNEL: f"{theirs},{mine}"}
        command = [*PYTEST, "-p", "tests.gpu.report.worker", *suite.arguments]
        try:
            self.child = Child(command, cwd=suite.cwd, env=env, scratch=suite.scratch,
                               pass_fds=(theirs, mine))  # fmt: skip
        finally:
            os.close(theirs)
            os.close(mine)
        os.set_blocking(self._lines, False)
        self._buffer = b""
        self.since = time.monotonic()
        self.collected = self.ready = False
        self.test: str | None = None
        self.ended = 0  # tests
        self.trouble = ""

    def sources(self) -> list[int]:
        """Descriptors that may have something to read."""
        return [self._lines] if self.child.at_end else [self._lines, self.child.output]

    def messages(self) -> list[dict[str, Any]]:
        """What it has told since the last time."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._lines, 1 << 16):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def order(self, test: str) -> None:
        self.test, self.since, self.ready = test, time.monotonic(), False
        with contextlib.suppress(BrokenPipeError):  # its end is noticed elsewhere
            os.write(self._orders, f"{test}\n".encode())

    def dismiss(self) -> None:
        """There is nothing more to do."""
        with contextlib.suppress(OSError):
            os.close(self._orders)
        self._orders = -1

    def close(self, patience: float = 2.0) -> None:
        self.dismiss()
        self.child.end(patience)
        os.close(self._lines)


class Pool:
    """Runs a suite; `done` is told every result, `log` every process's log."""

    def __init__(
        self, suite: Suite, jobs: int, until: float, grace: Callable[[], float],
        done: Callable[[Result], None], log: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self._suite, self._jobs, self._until, self._grace = suite, jobs, until, grace
        self._done, self._log = done, log
        self._waiting: list[str] | None = None  # None: nobody has collected yet
        self._workers: list[Worker] = []
        self._lost = self._sick = 0
        self._complaints: set[str] = set()  # of workers that did not start: each is told once
        self._number = 0
        self._threads = concurrent.futures.ThreadPoolExecutor(jobs)
        self._ending: list[concurrent.futures.Future[Result]] = []

    def run(self) -> None:
        try:
            for _ in range(self._jobs):
                self._hire()
            while self._busy():
                if time.monotonic() > self._until:
                    break
                self._turn()
            self._stop_the_rest()
            self._dismiss_all()
        finally:
            for one in self._workers:
                self._close(one, 0.0)
            self._threads.shutdown()
        self._tell_ended()

    def _tell_ended(self) -> None:
        """Results of those that were stopped, once their stacks are there."""
        for result in [one for one in self._ending if one.done()]:
            self._ending.remove(result)
            self._done(result.result())

    def _busy(self) -> bool:
        if self._hopeless():
            return False
        return self._waiting is None or bool(self._waiting) or any(w.test for w in self._workers)

    def _hopeless(self) -> str:
        """Why no other worker is tried, if so."""
        if self._lost >= _MOST_LOST:
            return "pytest did not start"
        return "the device does not answer any more" if self._sick >= _MOST_SICK else ""

    def _hire(self) -> None:
        self._workers.append(Worker(self._suite))

    def _turn(self) -> None:
        """Hears every worker once, and gives work to those that have none."""
        select.select([fd for one in self._workers for fd in one.sources()], [], [], 0.05)
        for one in list(self._workers):
            one.child.read()
            self._hear_all(one)
            if not one.child.running():
                self._gone(one)
            elif time.monotonic() - one.since > self._limit(one):
                self._hanging(one)
            elif one.ready and self._waiting:
                one.order(self._waiting.pop(0))
        self._tell_ended()
        while len(self._workers) < self._wanted():
            self._hire()

    def _wanted(self) -> int:
        if self._hopeless():
            return 0
        if self._waiting is None:
            return self._jobs
        return min(self._jobs, len(self._waiting) + sum(w.test is not None for w in self._workers))

    def _limit(self, one: Worker) -> float:
        if one.test is not None:
            return self._suite.limit(one.test)
        return float("inf") if one.ready else _START_S

    def _hear_all(self, one: Worker) -> None:
        for message in one.messages():
            self._hear(one, message)

    def _hear(self, one: Worker, message: dict[str, Any]) -> None:
        if "collected" in message:
            one.collected, self._lost = True, 0
            self._collected(message["collected"], message["errors"])
        elif "begin" in message:
            one.since = time.monotonic()
        elif "end" in message:
            one.test, one.since = None, time.monotonic()
            one.ended += 1
            self._sick = 0 if message["status"] == PASSED else self._sick
            self._done(self._result(message.pop("end"), **message))
        elif "ready" in message:
            one.ready = True
        elif "sick" in message:
            one.trouble = message["sick"]
            self._sick += one.ended == 1

    def _collected(self, tests: list[str], errors: dict[str, str]) -> None:
        if self._waiting is not None:
            return
        slow = [test for test in tests if any(word in test for word in _FIRST)]
        self._waiting = slow + [test for test in tests if test not in set(slow)]
        if not tests and not errors:
            self._done(self._result("collecting", FAILED, message="there are no tests"))
        for place, text in errors.items():
            self._done(self._result(place, FAILED, message=last_line(text), text=text))

    def _result(self, test: str, status: str, **more: Any) -> Result:
        part = f"{test} ({self._suite.label})" if self._suite.label else test
        command = [*PYTEST, test] if "::" in test else ()  # only a test can be run again
        return Result(self._suite.item, status, part, command=command, env=dict(self._suite.more),
                      limit=self._suite.limit(test), **more)  # fmt: skip

    def _gone(self, one: Worker) -> None:
        """It has ended by itself: a test has crashed it, or left it with a sick device."""
        self._hear_all(one)
        status = one.child.process.returncode
        seconds = time.monotonic() - one.since
        self._close(one, 0.0)
        if one.test is not None:
            self._done(self._result(
                one.test, CRASHED, seconds=seconds, stacks=one.child.stacks(),
                message=f"the process was {told(status)}{innermost(one.child.stacks())}",
                text=one.child.log.text()[-8000:],
            ))  # fmt: skip
        elif not one.collected:
            self._lost += 1
            message = f"{told(status)}: {last_line(one.child.log.text())}"
            if message not in self._complaints:
                self._complaints.add(message)
                self._done(self._result("collecting", FAILED, message=message,
                    text=one.child.log.text(), stacks=one.child.stacks()))  # fmt: skip

    def _hanging(self, one: Worker) -> None:
        """Its stacks take seconds; the others go on meanwhile."""
        self._workers.remove(one)
        if not one.collected:
            self._lost += 1
        self._ending.append(self._threads.submit(self._stopped, one, "its limit", self._grace()))

    def _stopped(self, one: Worker, why: str, grace: float) -> Result:
        seconds = time.monotonic() - one.since
        told_stacks = stacks.taken(one.child, grace)
        one.close()
        self._logged(one)
        between = "asking the device after a failure" if one.collected else "collecting"
        return self._result(
            one.test or between, TIMED_OUT, seconds=seconds, stacks=told_stacks,
            message=f"after {seconds:.0f} s, {why}{innermost(told_stacks)}",
            text=one.child.log.text()[-8000:],
        )  # fmt: skip

    def _stop_the_rest(self) -> None:
        """What runs is stopped, what waits is skipped; after the last test there is neither."""
        why = self._hopeless() or "the item's time was up"
        nobody = self._waiting is None and not self._hopeless()  # has collected in time
        for one in [one for one in self._workers if one.test is not None or nobody]:
            self._workers.remove(one)
            # A second is enough for Python's stacks. A debugger's would cost other items theirs.
            self._ending.append(self._threads.submit(self._stopped, one, why, 1.0))
        for test in self._waiting or []:
            self._done(self._result(test, SKIPPED, message=why))

    def _dismiss_all(self) -> None:
        """Lets them end by themselves, so that trouble at exit is in their logs."""
        for one in self._workers:
            one.dismiss()
        until = min(time.monotonic() + 5.0, self._until + 2.0)
        while time.monotonic() < until and any(one.child.running() for one in self._workers):
            for one in self._workers:
                one.child.read(0.02)
        for one in list(self._workers):
            self._hear_all(one)  # the last test may have left it with a sick device
            status = one.child.process.poll()
            self._close(one, 1.0)
            if status is not None and status < 0:
                self._done(self._result(
                    "at exit", CRASHED, message=f"a worker was {told(status)} after its last test",
                    text=one.child.log.text()[-8000:], stacks=one.child.stacks(),
                ))  # fmt: skip

    def _close(self, one: Worker, patience: float) -> None:
        if one in self._workers:
            self._workers.remove(one)
        one.close(patience)
        self._logged(one)

    def _logged(self, one: Worker) -> None:
        self._number += 1
        trouble = f"\nreplaced, since the device was sick: {one.trouble}" if one.trouble else ""
        name = " ".join(filter(None, [self._suite.item, self._suite.label]))
        self._log(f"{name}: worker {self._number}", one.child.log.text() + trouble)
