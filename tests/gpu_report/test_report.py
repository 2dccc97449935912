# SPDX-License-Identifier: Apache-2.0
"""The whole report on the simulated accelerator, with every fault it must survive."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.gpu.report import items, packing

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.gpu.report"]
CASES = [
    "tests/sim/test_accelerator.py::test_threads",
    "tests/sim/test_accelerator.py::test_empty_cache",
    "tests/sim/test_accelerator.py::test_decode[Q8_0-torch.float16-patched]",
]
MINUTES = 5  # far more than it takes: the rest is for a machine that does other things


def report(*options, status):
    done = subprocess.run(
        [*COMMAND, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def lines_of(out):
    return [json.loads(line) for line in (out / packing.RESULTS).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what was printed, seconds) of a report with all faults."""
    out = tmp_path_factory.mktemp("report") / "out"
    start = time.monotonic()
    done = report(
        "--device", "sim", "--minutes", str(MINUTES), "--out", str(out), "--jobs", "2",
        "--only", "facts", "import", "probes", "tests", "sanitizer", "--probes", "addresses", "events",
        "--tests", *CASES, "--inject", *items.FAULTS, status=1,
    )  # fmt: skip
    return out, done.stdout, time.monotonic() - start


def test_every_item_has_a_result_in_time(run):
    out, _, seconds = run
    assert seconds < 60 * MINUTES
    found = {line["item"]: line["status"] for line in lines_of(out) if "part" not in line}
    asked = {"facts": "passed", "import": "passed", "probes": "passed", "sanitizer": "skipped"}
    faults = {"segfault": "crashed", "hang": "timed out", "flood": "failed", "sticky": "failed"}
    assert found == {
        **dict.fromkeys(items.names(), "skipped"), **asked, "tests": "crashed",
        **{f"injected-{fault}": status for fault, status in faults.items()},
    }  # fmt: skip


def test_every_test_has_its_result(run):
    out, _, _ = run
    found = {
        line["part"]: line for line in lines_of(out) if line["item"] == "tests" and "part" in line
    }
    faults = "tests/gpu_report/faults.py::test_"
    assert {test: found[test]["status"] for test in CASES} == dict.fromkeys(CASES, "passed")
    assert found[f"{faults}segfault"]["message"].startswith("the process was killed by SIGSEGV")
    assert found[f"{faults}hang"]["status"] == "timed out"
    assert "failed after a flood" in found[f"{faults}flood"]["message"]
    assert "is lost" in found[f"{faults}sticky"]["message"]
    assert len(found) == len(CASES) + len(items.FAULTS)


def test_the_device_is_asked_after_failures(run):
    out, _, _ = run
    health = [line for line in lines_of(out) if line["item"] == "health"]
    assert len(health) == len(items.FAULTS) + 1
    assert {line["message"] for line in health} == {'{"answers": true}'}


def test_seven_files(run):
    out, printed, _ = run
    assert {path.name for path in out.iterdir()} == set(packing.NAMES)
    summary = (out / packing.SUMMARY).read_text()
    assert summary in printed
    assert "killed by SIGSEGV" in summary
    failures = (out / packing.FAILURES).read_text()
    assert "in hang" in failures
    assert failures.splitlines()[0] == f"{2 * len(items.FAULTS)} failures"
    assert failures.splitlines()[1].startswith("  injected-segfault: crashed: ")
    assert "in segfault" in failures
    assert "replaced, since the device was sick" in (out / packing.LOGS).read_text()
    facts = json.loads((out / packing.FACTS).read_text())
    assert facts["distorch"]
    assert facts["packages"]["torch"]
    tree = ElementTree.parse(out / packing.JUNIT)
    cases = tree.findall(".//testcase")
    assert {"test_threads", "test_hang"} <= {case.get("name") for case in cases}
    suite = tree.find("testsuite")
    assert int(suite.get("tests")) == len(cases)
    assert int(suite.get("errors")) == len(tree.findall(".//error"))
    # The last line's totals are junit.xml's.
    parts = printed.rpartition("tests, probes and sections: ")[2].partition(".")[0]
    assert sum(int(part.split()[0]) for part in parts.split(", ")) == len(cases)
    assert "health: after injected-segfault: passed: answers: true" in summary
    assert "probes (simulated: says nothing about a GPU)" in summary
    assert json.loads((out / packing.BENCHMARK).read_text()) == {"simulated": True}
    everything = "".join((out / name).read_text() for name in packing.NAMES)
    assert f"{Path.home()}/" not in everything
    assert "distorch-report-" not in everything


def test_the_deadline_is_said(tmp_path):
    """What no longer fits is skipped, and says so."""
    out = tmp_path / "out"
    done = report("--device", "sim", "--minutes", "0.05", "--out", str(out), status=1)
    assert "nothing ran" in done.stdout
    assert "nothing failed" not in done.stdout
    found = {line["item"]: line for line in lines_of(out)}
    assert set(found) == set(items.names())
    assert found["facts"]["status"] == "passed"
    assert "s were left, and it needs" in found["systems"]["message"]


def test_told_to_stop(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "--device", "sim", "--out", str(out), "--only", "facts", "--inject", "hang"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "injected-hang: starts" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped by SIGTERM" in printed
    assert "stopped by SIGTERM" in (out / packing.SUMMARY).read_text()
    found = {line["item"]: line["status"] for line in lines_of(out)}
    assert found["facts"] == "passed"
    assert found["injected-hang"] == "stopped"
    assert found["tests"] == "skipped"
    assert set(found) == {"injected-hang", *items.names()}
    assert (out / packing.FAILURES).read_text() == "nothing failed\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected --out DIR"),
        (["--out", "tests"], "has other files in it"),
        (["--out", "out/new", "--minutes", "0"], "expected --minutes above 0"),
        (["--out", "out/new", "--minutes", "nan"], "expected --minutes above 0"),
        (
            ["--out", "out/new", "--kit", "tests"],
            "not a kit: expected kit.json, made by make gpu-kit",
        ),
        (["--out", "/proc/new", "--device", "sim"], "nothing was run: "),
        (["--out", "out/new", "--only", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_wrong_use(options, said):
    told = report(*options, status=2).stderr
    assert said in told
    assert len(told.splitlines()) == 1


def test_without_a_gpu():
    """Where there is one it is hidden, as from all tests here."""
    done = report("--out", "out/new", status=2)
    assert "there is no CUDA device here" in done.stderr
    assert "--device sim" in done.stderr
    assert "{" not in done.stderr


def test_help_and_list():
    assert "summary.txt" in report("--help", status=0).stdout
    listed = report("--list", status=0).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(items.names())


def test_gpus_and_the_simulator_share_no_process():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/gpu/test_streams.py",
               "tests/sim/test_accelerator.py"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "DISTORCH_REQUIRE_CUDA": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "do not share a process" in done.stderr


def test_make_runs_without_a_registry():
    """With any Python, and no rule that installs something."""
    # This test may itself be run by make, which tells those below it.
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "-n", "VENV=/nowhere", "test-gpu", "gpu-report", "REPORT=some/folder"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "DISTORCH_REQUIRE_CUDA=1 python3 -m pytest tests/gpu",
        "python3 -m tests.gpu.report --minutes 9 --out some/folder",
    ]


def test_a_device_lost_in_the_last_test(tmp_path):
    """No test is left, and still what the worker says about the device is heard."""
    out = tmp_path / "out"
    report("--device", "sim", "--out", str(out), "--only", "tests", "--jobs", "1",
           "--tests", CASES[1], "--inject", "sticky", status=1)  # fmt: skip
    assert "replaced, since the device was sick" in (out / packing.LOGS).read_text()
