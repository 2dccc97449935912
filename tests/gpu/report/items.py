# SPDX-License-Identifier: Apache-2.0
"""The items of a report, in order, with their budgets."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from . import benchmarks, facts, reruns, sanitizer
from .probes import NAMES, ON_SIM
from .results import FAILED, PASSED, SKIPPED, Result, result_of
from .runner import Ended
from .workers import LONG
from .workplace import ROOT

CHILD = (sys.executable, "-m", "tests.gpu.report.child")
FAULTS = ("segfault", "hang", "flood", "sticky")
_FAULT_FILE = "tests/gpu_report/faults.py"
_HANG_S, _FAULT_S = 3.0, 20.0  # what faults may last: the one that hangs, and the others
_TEST_S, _LONG_S = 40.0, 75.0
_PROBE_S = 31.0
_DOCTOR_S, _AGAIN_S = 30.0, 90.0
_TESTS = {"cuda": "tests/gpu", "sim": "tests/sim/test_accelerator.py"}
_DAY_ONE = {"cuda": "tests/gpu/test_day_one.py", "sim": "tests/sim/test_day_one.py"}
# tests/gpu runs these again in a child process, under one name; here they are tests like others.
_EXPANDABLE = ("test_memory.py", "test_models.py", "test_streams.py")
_EXPANDABLE_TEST = "tests/gpu/test_memory.py::test_all_of_it_with_expandable_segments"
_SETTINGS = dict.fromkeys(
    ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"
)


@dataclasses.dataclass(frozen=True)
class Item:
    """`work(report, limit)` adds the results of its parts. Under `least` seconds it is skipped."""

    name: str
    budget: float
    work: Callable[[Any, float], None]
    about: str
    least: float = 3.0
    needs_distorch: bool = True


def host_facts(report: Any, _: float) -> None:
    found = facts.host(report.commit, ROOT)
    report.tell_facts(found)
    if facts.exclusive(report.gpus()):
        report.one_at_a_time()
    report.tell_facts({"report": report.about()})
    report.add(Result("facts", PASSED, message=f"{len(found)} facts"))


def imported(report: Any, limit: float) -> None:
    """distorch loads and its doctor finds nothing; if it does not load, it is built here."""
    if not report.workplace.built():
        build = True
        report.add(Result("import", FAILED, "import distorch", message="nothing is built"))
        report.usable = False
    else:
        build = _loads(report, limit)
    if build:
        _build(report)
    if report.usable:
        left = max(5.0, min(_DOCTOR_S, report.schedule.left()))
        ended = report.run("import: doctor", [*CHILD, "-m", "distorch", "doctor"], left)
        report.add(result_of("import", "doctor", ended))


def _loads(report: Any, limit: float) -> bool:
    """Imports it, on a timeout once more: the first import of torch reads gigabytes from a disk,
    and finds them in memory the second time. Whether building may help.
    """
    ended, loads = _torch_facts(report, limit)
    if ended.timed_out:
        ended, loads = _torch_facts(report, max(5.0, min(_AGAIN_S, report.schedule.left())))
        loads.message = f"the second try; {limit:.0f} s were too short. {loads.message}".strip()
    report.add(loads)
    report.usable = not loads.bad
    return not report.usable and not ended.timed_out and ended.status != facts.NO_CUDA


def _torch_facts(report: Any, limit: float) -> tuple[Ended, Result]:
    command = [*CHILD, "-m", "tests.gpu.report.facts", report.device]
    ended = report.run("import: import distorch", command, limit)
    report.tell_facts(_json(ended.log))
    return ended, result_of("import", "import distorch", ended)


def _build(report: Any) -> None:
    """With half of the time that is left, so that something can be run with what was built."""
    limit = min(240.0, report.schedule.left() / 2)
    if limit < 30:
        report.add(Result("import", SKIPPED, "build", message="there was no time to build"))
        return
    report.use_copy()
    cuda = report.device == "cuda"
    env = {
        "DISTORCH_CUDA": "1" if cuda else "0",
        "DISTORCH_SIM": "1",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    gpus = {gpu.get("compute_cap", "").replace(".", "") for gpu in report.gpus()} - {""}
    if cuda and gpus:
        env["DISTORCH_GPUS"] = " ".join(sorted(gpus))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ended = report.run("import: build", command, limit, env)
    report.add(result_of("import", "build", ended))
    if ended.ok:
        _, again = _torch_facts(report, 60.0)
        again.part = "import what was built here"
        report.add(again)
        report.usable = not again.bad


def _json(log: str) -> dict[str, Any]:
    """The last line of a log that is JSON."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


def probes(report: Any, limit: float) -> None:
    """Four at a time; those that take times measure alone (probes/__main__.py)."""
    until = time.monotonic() + limit
    names = report.options.probes or NAMES
    with concurrent.futures.ThreadPoolExecutor(report.side_by_side(4)) as threads:
        runs = [threads.submit(_probe, report, name, until) for name in names]
        for run in concurrent.futures.as_completed(runs):
            report.add(run.result())


def _probe(report: Any, name: str, until: float) -> Result:
    if report.device == "sim" and name not in ON_SIM:
        return Result("probes", SKIPPED, name, message="it asks about CUDA")
    left = min(_PROBE_S, until - time.monotonic())
    if left < 2:
        return Result("probes", SKIPPED, name, message="the item's time was up")
    command = [*CHILD, "-m", "tests.gpu.report.probes", name, "--device", report.device]
    env = {"DISTORCH_REPORT_LOCK": str(report.scratch / "probes.lock")}
    ended = report.run(f"probes: {name}", command, left, env)
    result = result_of("probes", name, ended, command=command)
    found = _json(ended.log)
    wrong = found.pop("wrong", [])
    if wrong:
        result.status, result.message = FAILED, "; ".join(wrong)
    elif not ended.ok and found and name == "assertion" and not ended.timed_out:
        # The process has a lost device. How it ends is something to know, not a failure.
        result.status, result.message = PASSED, f"then: {ended.how}"
    result.details = found
    return result


def tests(report: Any, limit: float) -> None:
    until = time.monotonic() + limit
    arguments = report.options.tests or [_TESTS[report.device]]
    extra = []
    if report.device == "cuda" and not report.options.tests:
        extra = ["--ignore", _DAY_ONE["cuda"], "--deselect", _EXPANDABLE_TEST]
    faults = [f"{_FAULT_FILE}::test_{fault}" for fault in report.options.inject]
    report.pool("tests", [*arguments, *extra, *faults], until, limit_of=_limit_of)
    if report.device == "cuda" and not report.options.tests:
        again = [f"tests/gpu/{name}" for name in _EXPANDABLE]
        again += ["--deselect", _EXPANDABLE_TEST]
        if until - time.monotonic() < 15:
            report.add(Result("tests", SKIPPED, "expandable segments", message="no time was left"))
            return
        report.pool("tests", again, until, _SETTINGS, "expandable segments", limit_of=_limit_of)


def _limit_of(test: str) -> float:
    if _FAULT_FILE in test:
        return _HANG_S if "hang" in test else _FAULT_S
    return _LONG_S if any(word in test for word in LONG) else _TEST_S


def day_one(report: Any, limit: float) -> None:
    path = _DAY_ONE[report.device]
    if not (report.workplace.folder / path).exists():
        report.add(Result("day-one", SKIPPED, message=f"no such file: {path}"))
        return
    report.pool("day-one", [path], time.monotonic() + limit, limit_of=lambda _: _LONG_S)


def injected(fault: str) -> Item:
    def work(report: Any, limit: float) -> None:
        command = [*CHILD, "-m", "tests.gpu_report.faults", fault]
        ended = report.run(f"injected-{fault}", command, limit)
        report.add(result_of(f"injected-{fault}", "", ended, command=command))

    budget = _HANG_S if fault == "hang" else _FAULT_S
    return Item(f"injected-{fault}", budget, work, f"a {fault}, on purpose", 3.0, False)


def _measured(name: str, *sections: str) -> Callable[[Any, float], None]:
    def work(report: Any, limit: float) -> None:
        benchmarks.measured(report, name, sections, limit)
        if report.device == "cuda":
            report.tell_facts({f"links after {name}": facts.links()})

    return work


ITEMS = (
    Item("facts", 5, host_facts, "the card, its driver, versions, settings", 1.0, False),
    Item("import", 30, imported, "distorch loads, and its doctor", 3.0, False),
    Item("probes", 35, probes, "questions that only a device can answer"),
    Item("tests", 120, tests, "tests/gpu, in parallel; then with expandable segments", 8.0),
    Item("benchmark", 70, _measured("benchmark", "links", "kernels", "hook"),
         "rates of links and kernels, cost of the hook", 10.0),
    Item("systems", 100, _measured("systems", "overlap", "systems"),
         "a transformer offloaded, then beside diffusers and accelerate", 15.0),
    Item("day-one", 80, day_one, "what people do on the first day", 8.0),
    Item("sanitizer", 50, sanitizer.checked, "a dozen tests under compute-sanitizer", 15.0),
    Item("reruns", 50, reruns.rerun, "failures again, one of each kind", 4.0, False),
)  # fmt: skip


def listed(inject: list[str]) -> list[Item]:
    """In their order; injected faults come early, so that the others show that they survive."""
    first = [item for item in ITEMS if item.name in ("facts", "import")]
    return [*first, *map(injected, inject), *ITEMS[len(first) :]]


def names() -> Mapping[str, str]:
    return {item.name: item.about for item in ITEMS}
