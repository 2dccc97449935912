# SPDX-License-Identifier: Apache-2.0
"""What an owner of a GPU can run and send in: tests, measurements, and what failed.

    python -m tests.gpu.report --minutes 9 --out report

needs torch for CUDA, pytest, and a distorch that is built in this tree (or a kit, or nvcc to build it
with). Everything runs in child processes with time limits; the report ends in time whatever they do.
What no longer fits is said to be skipped. DIR gets seven files, which are written as it goes on:

  summary.txt     what to read first; it is printed at the end
  facts.json      the card, its driver, versions, settings
  results.jsonl   a line for every item, test, probe and section of a benchmark
  junit.xml       the same for tools
  failures.txt    every failure: message, text, Python stacks, backtraces
  logs.txt        what every process printed, head and tail
  benchmark.json  what was measured

Exit status: 0 all passed, 1 something failed, was stopped, or nothing ran; 2 wrong use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from . import items, summary, workplace
from .conductor import Report, forget
from .packing import EARLIER, NAMES, Pack
from .probes import NAMES as PROBES
from .processes import end_all
from .schedule import Schedule

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """One of these signals: whoever waits for something must not catch it."""


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="python -m tests.gpu.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = list(items.names())
    found.add_argument(
        "--out", type=Path, metavar="DIR", help="where the seven files go (required)"
    )
    found.add_argument("--minutes", type=float, default=9.0, help="all of it (default 9)")
    found.add_argument("--device", choices=["cuda", "sim"], default="cuda",
                       help="sim: the simulated accelerator, to see that the report works")  # fmt: skip
    found.add_argument("--only", nargs="+", choices=known, default=[], metavar="ITEM",
                       help=", ".join(known))  # fmt: skip
    found.add_argument("--skip", nargs="+", choices=known, default=[], metavar="ITEM")
    found.add_argument("--jobs", type=int, default=min(6, os.cpu_count() or 1),
                       help="tests at a time (default: cores, at most 6)")  # fmt: skip
    found.add_argument("--tests", nargs="+", metavar="PATH",
                       help="other tests for the item tests: files or node ids")  # fmt: skip
    found.add_argument(
        "--probes", nargs="+", choices=PROBES, metavar="PROBE", help=", ".join(PROBES)
    )
    found.add_argument("--kit", type=Path, metavar="DIR",
                       help="compiled libraries and wheels (default: gpu-kit, if it is there)")  # fmt: skip
    found.add_argument("--inject", nargs="+", choices=items.FAULTS, default=[], metavar="FAULT",
                       help="faults on purpose, to see that the rest survives: "
                       + ", ".join(items.FAULTS))  # fmt: skip
    found.add_argument("--list", action="store_true", help="items and their budgets")
    return found


def checked(found: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error that says what to do."""
    if options.out is None:
        found.error("expected --out DIR, a folder for the files of the report")
    if not 0 < options.minutes < float("inf") or options.jobs < 1:
        found.error("expected --minutes above 0 (a number), and --jobs 1 or more")
    if options.out.exists() and not options.out.is_dir():
        found.error(f"{options.out} is not a folder")
    others = (
        [
            p.name
            for p in options.out.glob("*")
            if p.name not in NAMES and not p.name.startswith(EARLIER)
        ]
        if options.out.exists()
        else []
    )
    if others:
        found.error(f"{options.out} has other files in it ({', '.join(sorted(others)[:3])}): expected a "
                    "new folder, an empty one, or one of an earlier report")  # fmt: skip
    if options.kit is None and workplace.KIT.is_dir():
        options.kit = workplace.KIT
    if options.kit is not None:
        try:
            workplace.read_kit(options.kit)
        except (OSError, ValueError) as error:
            found.error(f"--kit {options.kit}: not a kit: {error}")
    if options.device == "cuda":
        _there_is_a_gpu(found)


def _there_is_a_gpu(found: argparse.ArgumentParser) -> None:
    """Asked in a child: a driver that hangs or crashes must not take the report with it."""
    command = [sys.executable, "-m", "tests.gpu.report.health", "cuda", "--count"]
    try:
        done = subprocess.run(
            command, cwd=workplace.ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        found.error("the CUDA driver does not answer within 20 s")
    try:
        told = json.loads(done.stdout)
    except ValueError:
        told = {"error": f"{done.stdout}{done.stderr}"[-300:]}
    if not told.get("count"):
        found.error(
            f"there is no CUDA device here ({told.get('error', 'the driver has none')}): expected a GPU "
            "and its driver. To see what the report does without one: --device sim"
        )


def listing() -> str:
    return "\n".join(f"{i.name:10} {i.budget:4.0f} s  {i.about}" for i in items.ITEMS)


def _stop(number: int, _: Any) -> None:
    for each in _STOPS:
        signal.signal(each, signal.SIG_IGN)
    end_all()
    raise Stopped(signal.Signals(number).name)


def main(arguments: list[str] | None = None) -> int:
    found = parser()
    options = found.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    schedule = Schedule(60 * options.minutes)
    try:
        checked(found, options)
    except OSError as error:  # a folder that may not be looked into
        found.error(str(error))
    for number in _STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or in the background
            signal.signal(number, _stop)
    scratch = Path(tempfile.mkdtemp(prefix="distorch-report-"))
    try:
        try:
            place = workplace.prepared(options.kit, scratch)
            pack = Pack(options.out, private=_private(scratch))
        except (OSError, ValueError) as error:
            found.error(f"nothing was run: {error}")
        return _reported(options, schedule, scratch, place, pack)
    except Stopped as why:
        print(f"stopped by {why}, before anything was run", file=sys.stderr)
        return 1
    finally:
        forget(scratch)


def _private(scratch: Path) -> dict[str, str]:
    """Paths that are nobody's business, and what stands for them. The longest first."""
    home = os.environ.get("HOME", "/").rstrip("/")
    paths = {str(scratch / "tree"): "<tree>", str(scratch): "<scratch>"}
    return paths | ({home: "~"} if home else {})


def _reported(
    options: argparse.Namespace, schedule: Schedule, scratch: Path, place: workplace.Workplace,
    pack: Pack,
) -> int:  # fmt: skip
    known = workplace.read_kit(options.kit) if options.kit else {}
    commit = known.get("commit") if place.folder != workplace.ROOT else None
    report = Report(options, pack, place, scratch, schedule, commit)
    stopped = False
    try:
        report.conduct()
    except Stopped as why:
        stopped = True
        report.stopped(f"stopped by {why}")
    with contextlib.suppress(OSError):  # the terminal may be gone
        print("\n" + (options.out / "summary.txt").read_text())
        print(
            f"{summary.last_words(report)}. The report is in {options.out}: please send all of it"
        )
    return 1 if stopped or report.failed or not report.ran else 0


if __name__ == "__main__":
    sys.exit(main())
