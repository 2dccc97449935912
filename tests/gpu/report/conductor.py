# SPDX-License-Identifier: Apache-2.0
"""Runs the items one after the other, and keeps what comes of them."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import items, summary
from .child import DEVICE
from .packing import Pack
from .processes import end_all
from .reruns import ITEM as RERUNS
from .results import FAILED, SKIPPED, STOPPED, Result, counted, last_line, whole
from .runner import Ended, Watched, run
from .schedule import Schedule
from .workers import Pool, Suite
from .workplace import ROOT, Workplace, copied

# A driver that makes a context takes seconds. The simulated device needs torch, which takes many
# to be imported where other programs are busy.
_HEALTH_S = {"cuda": 15.0, "sim": 60.0}


class Report:
    """One run of the report. Items add results, and run their processes, through it."""

    def __init__(
        self, options: argparse.Namespace, pack: Pack, workplace: Workplace, scratch: Path,
        schedule: Schedule, commit: str | None,
    ) -> None:  # fmt: skip
        self.options, self.pack, self.workplace, self.scratch = options, pack, workplace, scratch
        self.schedule, self.commit = schedule, commit
        self.device: str = options.device
        self.results: list[Result] = []  # items and parts, in the order in which they ended
        self.whole: list[Result] = []  # items only
        self.benchmark: dict[str, Any] = {} if self.device == "cuda" else {"simulated": True}
        self.usable = True  # distorch can be imported
        self._facts: dict[str, Any] = {}
        self._running: tuple[items.Item, float, int] | None = None  # since when, from which result
        self._alone = False

    # ---- what items use ----

    def add(self, result: Result) -> None:
        """A part goes to the files at once; a result without a part is its item's own."""
        self.results.append(result)
        if result.part:
            self.pack.result(result)
        if result.bad and result.item != RERUNS:
            self.pack.failure(result)
            self.say(f"  {result.status}: {result.name}: {result.message[:160]}")

    def run(
        self, title: str, command: Sequence[str], limit: float, env: Mapping[str, str] | None = None,
        watched: Watched | None = None,
    ) -> Ended:  # fmt: skip
        ended = run(
            command, limit=limit, cwd=self.workplace.folder, env=self._environment(env or {}),
            scratch=self.scratch, grace=self.schedule.grace(), watched=watched,
        )  # fmt: skip
        self.pack.log(f"{title} ({ended.how}, {ended.seconds:.1f} s)", ended.log)
        return ended

    def pool(
        self, item: str, arguments: Sequence[str], until: float, more: Mapping[str, str] | None = None,
        label: str = "", *, limit_of: Callable[[str], float],
    ) -> None:  # fmt: skip
        """Tests in parallel, until a time of the monotonic clock."""
        more = more or {}
        suite = Suite(
            item, arguments, self._environment(more), more, self.workplace.folder, self.scratch,
            label, limit_of,
        )  # fmt: skip
        jobs = self.options.jobs
        Pool(suite, jobs, until, self.schedule.grace, self.add, self.pack.log).run()

    def one_at_a_time(self) -> None:
        """The card lets one process in."""
        self._alone = True
        self.options.jobs = 1
        self.workplace.notes.append(
            "the card's compute mode is exclusive: one process at a time, and tests and probes that "
            "start processes of their own fail (nvidia-smi -c 0 changes it)"
        )
        self.say(self.workplace.notes[-1])

    def side_by_side(self, most: int) -> int:
        return 1 if self._alone else most

    def tell_facts(self, facts: Mapping[str, Any]) -> None:
        self._facts |= facts
        self.pack.facts(self._facts)

    def about(self) -> dict[str, Any]:
        return {
            "command": sys.argv[1:], "device": self.device, "minutes": self.options.minutes,
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "workplace": self.workplace.notes,
        }  # fmt: skip

    def gpus(self) -> list[dict[str, str]]:
        found = self._facts.get("gpus")
        return found if isinstance(found, list) else []

    def use_copy(self) -> None:
        """Builds must not touch the owner's tree."""
        if self.workplace.folder == ROOT:
            folder = copied(ROOT, self.scratch / "tree")
            notes = [*self.workplace.notes, "built in a copy of the tree"]
            self.workplace = Workplace(folder, self.workplace.site, notes)

    # ---- the run ----

    def conduct(self) -> None:
        for item in items.listed(self.options.inject):
            try:
                self._item(item)
            except Exception as error:  # no process could be started, say: the next item may do
                self._own_error(item.name, error)
            self._keep()
        self._keep(done=True)

    def _item(self, item: items.Item) -> None:
        reason = self._unwanted(item)
        limit = self.schedule.limit(item.budget, item.least)
        if reason is None and limit is None:
            reason = f"{self.schedule.left():.0f} s were left, and it needs {item.least:.0f}"
        if reason is not None or limit is None:
            self._ended(Result(item.name, SKIPPED, message=reason or ""))
            return
        self.say(f"{item.name}: starts, {limit:.0f} s at most")
        start, before = time.monotonic(), len(self.results)
        self._running = (item, start, before)
        try:
            item.work(self, limit)
        except Exception as error:
            self._own_error(item.name, error)
        mine = self.results[before:]
        result = mine[0] if len(mine) == 1 and not mine[0].part else None
        if result is None:
            result = whole(item.name, mine, 0.0)
        result.seconds = time.monotonic() - start
        self._running = None
        self._ended(result)
        if result.bad and item.name != RERUNS:
            self._health(item.name)

    def _own_error(self, item: str, error: Exception) -> None:
        text = traceback.format_exc()
        message = f"the report itself: {last_line(text) or error}"
        self.add(Result(item, FAILED, "report", message=message, text=text))

    def _unwanted(self, item: items.Item) -> str | None:
        if item.needs_distorch and not self.usable:
            return "import has failed"
        asked = not self.options.only or item.name in self.options.only
        if item.name.startswith("injected-") or (asked and item.name not in self.options.skip):
            return None
        return "not asked for"

    def _ended(self, result: Result) -> None:
        self.whole.append(result)
        if result not in self.results:
            self.results.append(result)
        self.pack.result(result)
        words = f"{result.name}: {result.status}"
        self.say(f"{words}, {result.seconds:.0f} s: {result.message}".rstrip(": ")[:200])

    def _health(self, item: str) -> None:
        """Whether the device has survived what failed."""
        command = [sys.executable, "-m", "tests.gpu.report.health", self.device]
        limit = _HEALTH_S[self.device]
        if self.schedule.to_the_end() < limit:
            self.add(Result("health", SKIPPED, f"after {item}", message="no time"))
            return
        ended = self.run(f"health after {item}", command, limit)
        result = Result("health", "passed" if ended.ok else FAILED, f"after {item}", ended.seconds)
        result.message = last_line(ended.log) if not ended.timed_out else ended.how
        self.add(result)

    def stopped(self, why: str) -> None:
        """Somebody ends the report: everything that runs ends, and what there is is packed."""
        end_all()
        if self._running is not None:
            item, start, before = self._running
            parts = ", ".join(
                f"{n} {status}" for status, n in counted(self.results[before:]).items()
            )
            message = f"{why}; until then {parts or 'nothing'}"
            self._ended(Result(item.name, STOPPED, "", time.monotonic() - start, message))
        ended = {result.item for result in self.whole}
        for item in items.listed(self.options.inject):
            if item.name not in ended:
                self._ended(Result(item.name, SKIPPED, message=self._unwanted(item) or why))
        self._keep(done=True)

    def _keep(self, done: bool = False) -> None:
        """Files that are written anew after every item."""
        left_out = (RERUNS, "health")  # evidence about failures, not failures
        self.pack.junit([r for r in summary.parts(self) if r.item not in left_out])
        self.pack.benchmark(self.benchmark)
        if done:
            self.pack.finish()
        try:
            told = summary.told(self, self._facts, done)
        except Exception:  # what a device told is not what was expected: the other files have it
            told = (
                f"the summary could not be written; see the other files\n{traceback.format_exc()}"
            )
        self.pack.summary(told)

    @property
    def ran(self) -> bool:
        """Whether anything did that could fail; facts alone are what was asked for, or nothing."""
        about = [] if self.options.only == ["facts"] else ["facts"]
        return any(r.status != SKIPPED for r in self.whole if r.item not in about)

    @property
    def failed(self) -> bool:
        return any(result.bad for result in self.whole if result.item != RERUNS)

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"[{self.schedule.spent():4.0f} s] {text}", flush=True)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        cuda = self.device == "cuda"
        return {
            **self.workplace.environment(), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "DISTORCH_REPORT_TREE": str(ROOT),
            "DISTORCH_REQUIRE_CUDA": "1" if cuda else "0", DEVICE: self.device,
            **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""}), **more,
        }  # fmt: skip


def forget(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
