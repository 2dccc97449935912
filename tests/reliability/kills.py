# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.kills [COUNT]: kill -9 at random moments of what users do.

After each: no half-written file where a good one was, no scratch file left, and the next process
starts clean, with the right numbers. With --stop SECONDS each process stands still for so long
before, as behind Ctrl-Z: when it goes on, its numbers are still right.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.reliability.victim import check_folder

LONGEST = 1.5  # seconds from "ready" to the kill
AFTERWARDS = 2.0  # seconds that a process runs on after it stood still; a check takes a few ms
LEAST_WORK = 0.2  # seconds of a CPU that it takes in that time, if it goes on at all


def run(
    count: int, seed: int = 0, stop: float = 0.0, progress: Callable[[str], None] = print
) -> None:
    """AssertionError at the first promise that is broken."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "model"), Path(name, "scratch")
        folder.mkdir()
        scratch.mkdir()
        environment = {**os.environ, "DISTORCH_DISK": str(scratch), "OMP_NUM_THREADS": "1"}
        for number in range(count):
            victim = subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.victim", str(folder), str(seed + number)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            said = victim.stdout.readline()
            assert said == "ready\n", f"it does not start again: {victim.communicate()[1][-2000:]}"
            time.sleep(dice.uniform(0, LONGEST))
            if stop:
                victim.send_signal(signal.SIGSTOP)
                time.sleep(stop)
                before = _cpu_seconds(victim)
                victim.send_signal(signal.SIGCONT)
                time.sleep(AFTERWARDS)
                worked = _cpu_seconds(victim) - before
                assert worked > LEAST_WORK, f"it took {worked:.2f} s of a CPU since it goes on"
            assert victim.poll() is None, f"it ended by itself: {victim.communicate()[1][-2000:]}"
            victim.kill()
            victim.communicate()
            check_folder(folder, scratch)
            if number % 20 == 19:
                progress(f"{number + 1} kills")


def _cpu_seconds(process: subprocess.Popen) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200, help="kills (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=float, default=0.0, help="seconds that it stands still")
    parsed = parser.parse_args()
    run(parsed.count, parsed.seed, parsed.stop)
    print(f"{parsed.count} kills: nothing lost, nothing left")
