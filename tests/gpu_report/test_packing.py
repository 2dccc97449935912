# SPDX-License-Identifier: Apache-2.0
"""What is sent in: seven files, none beyond the cap, whatever came of the items."""

import json
import os
from xml.etree import ElementTree

import pytest

from tests.accelerator import kernels
from tests.gpu.report import packing, reruns, sanitizer
from tests.gpu.report.results import (
    CRASHED,
    FAILED,
    PASSED,
    SKIPPED,
    TIMED_OUT,
    Result,
    found_wrong,
    innermost,
    last_line,
    whole,
)


def test_files_stay_below_the_cap(tmp_path):
    cap = 20_000
    pack = packing.Pack(tmp_path / "out", cap)
    text = "\x1b[31mword \x00" * 5_000
    results = [
        Result("tests", FAILED, f"a.py::test_{i}", message=text, text=text) for i in range(60)
    ]
    for result in results:
        pack.result(result)
        pack.log(result.name, text)
        pack.failure(result)
    pack.junit(results)
    pack.facts({"much": text})
    pack.benchmark({"links": [1]})
    pack.summary(text)
    pack.finish()
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(files) == set(packing.NAMES)
    assert max(files.values()) <= cap
    assert "left out" in json.loads((tmp_path / "out" / packing.FACTS).read_text())
    assert json.loads((tmp_path / "out" / packing.BENCHMARK).read_text()) == {"links": [1]}
    lines = (tmp_path / "out" / packing.RESULTS).read_text().splitlines()
    assert all(json.loads(line)["status"] == FAILED for line in lines)
    ElementTree.parse(tmp_path / "out" / packing.JUNIT)


def test_two_reports_into_one_folder(tmp_path):
    """Never at the same time; and what was there is kept."""
    for number in range(3):
        pack = packing.Pack(tmp_path)
        with pytest.raises(OSError, match="another report is writing"):
            packing.Pack(tmp_path)
        pack.summary(f"report {number}")
        os.close(pack._held)
    names = ("earlier", "earlier-2", ".")
    kept = [(tmp_path / name / packing.SUMMARY).read_text() for name in names]
    assert kept == ["report 0", "report 1", "report 2"]


def test_paths_that_are_private(tmp_path):
    private = {"/home/me/scratch": "<scratch>", "/home/me": "~"}
    pack = packing.Pack(tmp_path, private=private)
    pack.facts({"a": "/home/me/scratch/x", "b": "/home/me/y", "c": "/home/mean", "d": "/home/me"})
    found = json.loads((tmp_path / packing.FACTS).read_text())
    assert list(found.values()) == ["<scratch>/x", "~/y", "/home/mean", "~"]


def test_the_last_log_has_room_too(tmp_path):
    pack = packing.Pack(tmp_path, 100_000)
    for number in range(40):
        pack.log(f"log {number}", "x" * 90_000)
    assert "log 0\n" in (tmp_path / packing.LOGS).read_text()
    assert "log 9\n" in (tmp_path / packing.LOGS).read_text()


def test_junit(tmp_path):
    pack = packing.Pack(tmp_path)
    pack.junit([
        Result("tests", PASSED, "t/a.py::test_one[x]", 1.5), Result("tests", SKIPPED, "b.py::two"),
        Result("probes", CRASHED, "fork", message="killed", text="]]> <&"),
    ])  # fmt: skip
    cases = ElementTree.parse(tmp_path / packing.JUNIT).findall(".//testcase")
    assert [case.get("name") for case in cases] == ["test_one[x]", "two", "fork"]
    assert cases[0].get("classname") == "tests.t/a.py"
    assert cases[2].find("error").text == "]]> <&"


def test_messages_of_one_kind():
    same = [
        "CUDA error at 0x7f00 in /tmp/abc/x.py:12 after 3.5 s",
        "CUDA error at 0x8a11 in /home/me/x.py:7 after 12 s",
    ]
    assert len({reruns.kind_of(message) for message in same}) == 1
    assert reruns.kind_of("CUDA error") != reruns.kind_of("sim error")


def test_groups():
    results = [
        Result("tests", TIMED_OUT, "a", message="stopped after 40 s"),
        Result("tests", FAILED, "b", message="shape 3"),
        Result("tests", FAILED, "c", message="at 0x1"), Result("tests", FAILED, "d", message="at 0x2"),
        Result("tests", PASSED, "e"), Result(reruns.ITEM, FAILED, "c (again)", message="at 0x3"),
    ]  # fmt: skip
    names = [[result.part for result in group] for group in reruns.grouped(results)]
    assert names == [["c", "d"], ["b"], ["a"]]


def test_an_item_is_as_bad_as_its_worst_part():
    parts = [
        Result("tests", PASSED, "a"),
        Result("tests", FAILED, "b"),
        Result("tests", SKIPPED, "c"),
    ]
    assert whole("tests", parts, 1.0).status == FAILED
    assert whole("tests", parts, 1.0).message == "1 passed, 1 failed, 1 skipped"
    assert whole("tests", parts[2:], 1.0).status == SKIPPED
    assert whole("tests", [], 1.0).status == FAILED


def test_sanitized_cases_are_tests():
    """Names that no longer exist would be reported as failures, on somebody's GPU."""
    for _, _, tests in sanitizer.CASES.values():
        for test in tests:
            name, _, values = test.partition("::")[2].partition("[")
            if name in ("test_decode", "test_dequantise"):
                code, dtype, *patched = values.rstrip("]").split("-")
                assert code in kernels.PLAIN + kernels.BLOCKS
                assert dtype in map(str, kernels.DTYPES)
                assert patched in ([], ["plain"], ["patched"])


def test_where_a_process_was():
    stacks = """process 7:
Thread 0x1 (most recent call first):
  File "/x/lib/python3.12/threading.py", line 1 in wait

Current thread 0x2 (most recent call first):
  File "/x/lib/python3.12/selectors.py", line 415 in select
  File "/home/me/models.py", line 20 in forward

Extension modules: numpy
"""
    assert innermost(stacks) == ", in forward (models.py:20)"
    assert (
        innermost(stacks.replace("/home/me", "/x/lib/python3.12"))
        == ", in select (selectors.py:415)"
    )
    assert innermost("") == ""


def test_what_pytest_and_the_sanitizer_found():
    assert found_wrong("...E      [100%]\nE       ValueError: no\n1 failed") == "ValueError: no"
    log = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4\n1 passed"
    assert found_wrong(log) == "========= Invalid __global__ read of size 4"
    assert last_line("error\n========= ERROR SUMMARY: 0 errors\n") == "error"
