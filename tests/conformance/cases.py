# SPDX-License-Identifier: Apache-2.0
"""Cases (architecture x check x system), each architecture in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import evidence
from .checks import CHECKS, Built, CannotDoError, Subject
from .systems import SYSTEMS, Resident, System

OK, FAILS, NOT_APPLICABLE = "ok", "fails", "not applicable"
_STARTS = "starts"
# What the checks would otherwise import again in every process.
_IMPORTED_ONCE = (
    "accelerate", "diffusers.hooks", "peft", "safetensors.torch", "torch._dynamo", "transformers",
    "transformers.generation", "transformers.modeling_utils",
)  # fmt: skip
_SECONDS = 60  # one check of one system
_MEMORY = 8 << 30  # address space that one process may add to what it starts with


@dataclass(frozen=True)
class Case:
    """What came of one check of one architecture under one system."""

    architecture: str
    check: str
    system: str
    verdict: str
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def judge(
    built: Built,
    check: str,
    systems: Sequence[System],
    starts: Callable[[str], None] = lambda system: None,
) -> Iterator[tuple[str, str, str]]:
    """(system, verdict, reason) of each system, compared with the resident module.

    `starts` is told whose turn it is.
    """
    run, resident = CHECKS[check], Resident()
    starts(resident.name)
    try:
        wanted = _observed(run, built, resident)
    except Exception as error:
        for system in systems:
            yield system.name, NOT_APPLICABLE, _told(error)
        return
    for system in systems:
        starts(system.name)
        try:
            found = evidence.difference(_observed(run, built, system), wanted)
        except Exception as error:
            yield system.name, FAILS, _told(error)
            continue
        if found is None:
            yield system.name, OK, ""
            continue
        # Is it the model that differs from run to run?
        unsteady = evidence.difference(_observed(run, built, resident), wanted)
        if unsteady is not None:
            yield system.name, NOT_APPLICABLE, f"the resident run does not repeat: {unsteady}"
        else:
            yield system.name, FAILS, found


def _observed(run: Callable[[Subject], Any], built: Built, system: System) -> Any:
    with _time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(Subject(built, system))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _told(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    if isinstance(error, CannotDoError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text[:200]} ({Path(frame.filename).name}:{frame.lineno})"


def run_architecture(
    name: str, make: Callable[[], Built], checks: Sequence[str], systems: Sequence[str]
) -> list[Case]:
    """All cases of one architecture. A process that dies costs the cases that it was at."""
    found: dict[tuple[str, str], Case] = {}

    def note(check: str, system: str, verdict: str, reason: str) -> None:
        found.setdefault((check, system), Case(name, check, system, verdict, reason))

    while left := [c for c in checks if any((c, s) not in found for s in systems)]:
        at = (left[0], "nobody")
        for check, system, verdict, reason in _in_a_child(make, left, systems):
            at = (check, system)
            if verdict != _STARTS:
                note(check, system, verdict, reason)
        if at[1] == "nobody":
            for check in left:
                for system in systems:
                    note(check, system, NOT_APPLICABLE, "the model could not be built")
        elif at not in found or at[1] == "resident":
            verdict = NOT_APPLICABLE if at[1] == "resident" else FAILS
            for system in systems:
                note(at[0], system, verdict, f"the process died in the {at[1]} run")
    return list(found.values())


def _in_a_child(
    make: Callable[[], Built], checks: Sequence[str], systems: Sequence[str]
) -> Iterator[tuple[str, str, str, str]]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(make, checks, systems, sender))
    child.start()
    sender.close()
    with contextlib.suppress(EOFError), receiver:
        while True:
            yield receiver.recv()
    child.join()


def _work(
    make: Callable[[], Built], checks: Sequence[str], systems: Sequence[str], out: Connection
) -> None:
    import torch

    with Path(os.devnull).open("w") as nothing:  # libraries talk a lot
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    torch.set_num_threads(1)
    _limit_memory()
    folder = tempfile.mkdtemp(prefix="conformance-")
    tempfile.tempdir = folder
    os.environ["TMPDIR"] = folder
    try:
        built = make()
        for check in checks:

            def starts(system: str, check: str = check) -> None:
                out.send((check, system, _STARTS, ""))

            chosen = [SYSTEMS[name] for name in systems]
            for system, verdict, reason in judge(built, check, chosen, starts):
                out.send((check, system, verdict, reason))
    finally:
        out.close()
        shutil.rmtree(folder, ignore_errors=True)


def _limit_memory() -> None:
    if "distorch.testing._sim" in sys.modules:
        return  # in a test process: the simulator takes addresses by the hundred gigabytes
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_all(
    zoo: dict[str, Callable[[], Built]],
    checks: Sequence[str],
    systems: Sequence[str],
    *,
    jobs: int = 1,
    done: Callable[[str, list[Case]], None] = lambda name, cases: None,
) -> list[Case]:
    """Every case, `jobs` architectures at a time."""

    for library in _IMPORTED_ONCE:
        importlib.import_module(library)

    def one(name: str) -> list[Case]:
        cases = run_architecture(name, zoo[name], checks, systems)
        done(name, cases)
        return cases

    with ThreadPoolExecutor(jobs) as pool:
        return [case for cases in pool.map(one, zoo) for case in cases]
