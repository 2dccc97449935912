# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.kills [COUNT]: kill -9 at random moments of what users do.

After each: no half-written file where a good one was, no scratch file left, and the next process
starts clean, with the right numbers. With --stop SECONDS each process stands still for so long
before, as behind Ctrl-Z: when it goes on, its numbers are still right. With --disk it is the disk
that stands still, with the model's file and the scratch files. This needs bindfs: all is on a file
system whose process is stopped.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.reliability.victim import check_folder

LONGEST = 1.5  # seconds from "ready" to the kill
AFTERWARDS = 2.0  # seconds that a process runs on after it stood still; a check takes a few ms
LEAST_WORK = 0.2  # seconds of a CPU that it takes in that time, if it goes on at all


def run(
    count: int,
    seed: int = 0,
    stop: float = 0.0,
    *,
    disk: bool = False,
    progress: Callable[[str], None] = print,
) -> None:
    """AssertionError at the first promise that is broken."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, _files_in(Path(name), disk) as (place, server):
        folder, scratch = place / "model", place / "scratch"
        folder.mkdir()
        scratch.mkdir()
        environment = {
            **os.environ, "DISTORCH_DISK": str(scratch), "XDG_CACHE_HOME": str(place / "cache"),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        for number in range(count):
            victim = subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.victim", str(folder), str(seed + number)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            said = victim.stdout.readline()
            assert said == "ready\n", f"it does not start again: {victim.communicate()[1][-2000:]}"
            time.sleep(dice.uniform(0, LONGEST))
            if stop:
                _stand_still(victim, server or victim, stop)
            assert victim.poll() is None, f"it ended by itself: {victim.communicate()[1][-2000:]}"
            victim.kill()
            victim.communicate()
            if disk:
                _tidy(folder, scratch)
            check_folder(folder, scratch)
            if number % 20 == 19:
                progress(f"{number + 1} kills")


def _stand_still(victim: subprocess.Popen, stopped: subprocess.Popen, seconds: float) -> None:
    """AssertionError if the victim does not go on afterwards."""
    stopped.send_signal(signal.SIGSTOP)
    first = _cpu_seconds(victim)
    time.sleep(seconds)
    before = _cpu_seconds(victim)
    assert before - first < seconds / 2, "it goes on without what was stopped"
    stopped.send_signal(signal.SIGCONT)
    time.sleep(AFTERWARDS)
    worked = _cpu_seconds(victim) - before
    assert worked > LEAST_WORK, f"it took {worked:.2f} s of a CPU since it goes on"


@contextmanager
def _files_in(folder: Path, disk: bool) -> Iterator[tuple[Path, subprocess.Popen | None]]:
    """Where the files go. If they have a `disk` of their own: also the process that serves it."""
    if not disk:
        yield folder, None
        return
    below, mounted = folder / "below", folder / "mounted"
    below.mkdir()
    mounted.mkdir()
    server = subprocess.Popen(["bindfs", "-f", "-o", "no-allow-other", str(below), str(mounted)])
    try:
        while not os.path.ismount(mounted):
            assert server.poll() is None, "bindfs does not run here"
            time.sleep(0.01)
        yield mounted, server
    finally:
        server.send_signal(signal.SIGCONT)  # else nothing that waits for it could end
        server.terminate()
        server.wait()


def _tidy(folder: Path, scratch: Path) -> None:
    """What such a file system leaves. A file that is deleted while it is open is renamed, and goes
    a moment after the last process that has it open. And each file has a name from the beginning:
    one that is being written stays when its writer is killed.
    """
    deadline = time.monotonic() + 5
    while list(scratch.glob(".fuse_hidden*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for half in folder.glob(".*.tmp"):
        half.unlink()


def _cpu_seconds(process: subprocess.Popen) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200, help="kills (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=float, default=0.0, help="seconds that it stands still")
    parser.add_argument("--disk", action="store_true", help="the disk stands still instead")
    parsed = parser.parse_args()
    run(parsed.count, parsed.seed, parsed.stop, disk=parsed.disk)
    print(f"{parsed.count} kills: nothing lost, nothing left")
