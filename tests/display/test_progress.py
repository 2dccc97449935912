# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal, in a notebook, in a log; and when nobody can be told."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import types

import pytest

from distorch.display import progress
from distorch.display.progress import progress_of

MiB = 1 << 20


class Out(io.StringIO):
    def __init__(self, terminal=False):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(monkeypatch, clock, out, steps, wanted=None, total=100 * MiB):
    """Work in steps of (seconds, bytes)."""
    monkeypatch.setattr(sys, "stderr", out)
    with progress_of(wanted, total, "loading") as done:
        for seconds, nbytes in steps:
            clock[0] += seconds
            done(nbytes)
    return out.getvalue().splitlines()


def test_a_log_gets_a_line_every_five_seconds(monkeypatch, clock):
    lines = run(monkeypatch, clock, Out(), [(1, 5 * MiB)] * 20)
    assert lines == [
        "loading: 25.00 MiB of 100.00 MiB (25%), 5.00 MiB/s, 15 s left",
        "loading: 50.00 MiB of 100.00 MiB (50%), 5.00 MiB/s, 10 s left",
        "loading: 75.00 MiB of 100.00 MiB (75%), 5.00 MiB/s, 5 s left",
        "loading: 100.00 MiB of 100.00 MiB (100%), 5.00 MiB/s, 20 s",
    ]


def test_quick_work_is_silent_in_a_log(monkeypatch, clock):
    assert run(monkeypatch, clock, Out(), [(4.9, 100 * MiB)]) == []
    assert run(monkeypatch, clock, Out(), [], total=0) == []


def test_true_and_false(monkeypatch, clock):
    (line,) = run(monkeypatch, clock, Out(), [(1, 100 * MiB)], wanted=True)
    assert line == "loading: 100.00 MiB of 100.00 MiB (100%), 100.00 MiB/s, 1 s"
    assert run(monkeypatch, clock, Out(), [(99, MiB)] * 5, wanted=False) == []
    assert run(monkeypatch, clock, Out(terminal=True), [(99, MiB)] * 5, wanted=False) == []


def test_other_units(monkeypatch, clock):
    out = Out()
    monkeypatch.setattr(sys, "stderr", out)
    with progress_of(True, 24, "sampling", "steps") as done:
        clock[0] += 6
        done(6)
    assert (
        out.getvalue().splitlines()[0]
        == "sampling: 6 steps of 24 steps (25%), 1 steps/s, 18 s left"
    )


def test_a_terminal_gets_a_bar(monkeypatch):
    out = Out(terminal=True)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with progress_of(None, 100, "loading") as done:
        done(100)
    assert "loading: 100%" in out.getvalue() and "\r" in out.getvalue()


def test_a_terminal_without_a_width_gets_a_bar():
    """As `docker exec -t` and some runners give it: 0 columns, of which tqdm makes an empty bar."""
    code = """if True:
        import sys, time
        from distorch.display import progress
        progress._DELAY = 0.0
        with progress.progress_of(None, 100, "loading") as done:
            done(100)
    """
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True)
    os.set_blocking(main, False)
    assert b"loading: 100%" in os.read(main, 10_000)
    os.close(main)
    os.close(terminal)


def test_quick_work_shows_no_bar(monkeypatch):
    out = Out(terminal=True)
    monkeypatch.setattr(sys, "stderr", out)
    with progress_of(None, 100, "loading") as done:
        done(100)
    assert out.getvalue() == ""


def in_a_kernel(monkeypatch, kernel):
    shell = types.SimpleNamespace(kernel=kernel)
    module = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", module)


def test_a_notebook_is_told_from_a_shell(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not progress.in_notebook()
    in_a_kernel(monkeypatch, None)  # `ipython` in a terminal
    assert not progress.in_notebook()
    in_a_kernel(monkeypatch, object())
    assert progress.in_notebook()


def test_a_notebook_gets_a_bar(monkeypatch):
    out = Out()
    in_a_kernel(monkeypatch, object())
    monkeypatch.setattr(sys, "stderr", out)
    with progress_of(True, 100, "loading") as done:
        done(100)
    assert "\r" in out.getvalue()


def test_an_interrupt_closes_the_bar(monkeypatch):
    told = []

    class Interrupted:
        def __init__(self, **options):
            pass

        def update(self, done):
            raise KeyboardInterrupt

        def close(self):
            told.append("closed")

    monkeypatch.setattr("tqdm.auto.tqdm", Interrupted)
    monkeypatch.setattr(sys, "stderr", Out(terminal=True))
    with pytest.raises(KeyboardInterrupt), progress_of(True, 3, "loading") as done:
        done(1)
    assert told == ["closed"]


class Broken(Out):
    """Writing fails, as it does when a terminal is gone or a pipe is closed."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


class Strange(Out):
    """Raises what no file raises."""

    def write(self, text):
        raise RuntimeError("the console is gone")


def bare(terminal):
    return object()


def closed(terminal):
    out = Out(terminal)
    out.close()
    return out


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("kind", [Broken, Strange, closed, bare])
@pytest.mark.parametrize("wanted", [None, True])
def test_work_goes_on_when_nobody_can_be_told(monkeypatch, terminal, kind, wanted):
    monkeypatch.setattr(sys, "stderr", kind(terminal))
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    count = 0
    with progress_of(wanted, 100, "loading") as done:
        for _ in range(10):
            done(10)
            count += 1
    assert count == 10


def test_a_bar_that_failed_is_left_alone(monkeypatch):
    """Its end, and Python's when it lets go of the bar, would fail again."""
    tried = []

    class Widget:
        disable = False

        def __init__(self, **options):
            tried.append("made")

        def update(self, done):
            tried.append(done)
            raise LookupError("no comm: the front end is gone")

        def close(self):
            tried.append("closed")

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    monkeypatch.setattr(sys, "stderr", Out(terminal=True))
    with progress_of(True, 3, "loading") as done:
        for step in (1, 2):
            done(step)
    assert tried == ["made", 1]


def test_without_any_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_of(True, 100, "loading") as done:
        done(100)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_of_the_work_is_the_caller_s(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Out(terminal))
    with pytest.raises(ZeroDivisionError), progress_of(True, 100, "loading") as done:
        done(50)
        raise ZeroDivisionError


def test_importing_distorch_says_nothing():
    """tqdm warns in a notebook without ipywidgets; it is imported when there is a bar."""
    code = "import sys, distorch; assert 'tqdm.auto' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
