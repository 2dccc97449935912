# SPDX-License-Identifier: Apache-2.0
"""One subprocess: whatever it does, the runner comes back, with what there was to know."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.report import logs, runner
from tests.gpu.report.schedule import PACKING_S, Schedule

ROOT = Path(__file__).parents[2]
CHILD = [sys.executable, "-m", "tests.gpu.report.child"]
AMPLE_S = 20.0  # for what should take moments, on a machine that does other things


@pytest.fixture
def run(tmp_path):
    def running(*command, limit=AMPLE_S):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return runner.run(command, limit=limit, cwd=ROOT, env=environment, scratch=tmp_path)

    return running


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid):
    """Whether a process that was killed is gone: the system takes a moment for that."""
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


def test_a_program_that_ends(run):
    ended = run(sys.executable, "-c", "print('said'); raise SystemExit(3)")
    assert (ended.status, ended.timed_out, ended.log) == (3, False, "said\n")
    assert not ended.ok
    assert not ended.crashed
    assert ended.how == "exit status 3"


def test_a_crash_tells_its_stack(run):
    ended = run(*CHILD, "-m", "tests.gpu_report.faults", "segfault")
    assert ended.crashed
    assert ended.how == "killed by SIGSEGV"
    assert "in segfault" in ended.stacks


def test_a_hang_tells_its_stack(run):
    start = time.monotonic()
    ended = run(*CHILD, "-m", "tests.gpu_report.faults", "hang", limit=1.0)
    assert ended.timed_out
    assert "in hang" in ended.stacks
    assert time.monotonic() - start < 1 + AMPLE_S


def test_one_that_goes_on_no_more(tmp_path):
    """Its file is as good as a log: it hangs when no row comes."""
    program = "import time, pathlib; pathlib.Path('rows').write_text(''); time.sleep(1e6)"
    watched = runner.Watched(tmp_path / "rows", 1.0)
    ended = runner.run(
        [sys.executable, "-c", program], limit=10 * AMPLE_S, cwd=tmp_path, env=os.environ,
        scratch=tmp_path, watched=watched,
    )  # fmt: skip
    assert ended.timed_out
    assert 1 <= ended.seconds < AMPLE_S


def test_one_that_will_not_end_is_killed(run):
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1e6)"
    ended = run(sys.executable, "-c", program, limit=1.0)
    assert ended.timed_out
    assert ended.status == -signal.SIGKILL


def test_a_flood_is_capped(run):
    ended = run(*CHILD, "-m", "tests.gpu_report.faults", "flood")
    assert ended.status == 1
    assert len(ended.log) < logs.CAP + 1000
    assert ended.log.startswith("a log without end")
    assert "bytes left out" in ended.log
    assert "failed after a flood" in ended.log.splitlines()[-1]


@pytest.mark.parametrize("new_session", [False, True])
def test_a_grandchild_that_holds_the_pipe(run, new_session):
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e6)'],"
        f" start_new_session={new_session})\n"
        "print(child.pid)"
    )
    ended = run(sys.executable, "-c", program)
    assert ended.status == 0
    assert not ended.timed_out
    assert ends(int(ended.log))
    assert ended.notes == ["1 processes were left behind and were killed"]


def test_a_log_keeps_its_ends():
    log = logs.CappedLog(10)
    for letter in b"abcdefghijklmnopqrstuvwxyz":
        log.add(bytes([letter]))
    assert log.text() == "abcde\n… 16 bytes left out …\nvwxyz"
    assert logs.middle_out("short", 10) == "short"


def test_what_items_get():
    now = [0.0]
    schedule = Schedule(100, clock=lambda: now[0])
    assert schedule.limit(30, least=5) == 30
    now[0] = 70.0
    assert schedule.limit(30, least=5) == 100 - 70 - PACKING_S
    assert schedule.limit(30, least=16) is None
    now[0] = 96.0
    assert schedule.left() == 0
    assert 0 < schedule.grace() <= 100 - 96
    assert Schedule(20, clock=lambda: 0.0).left() == 15
