# SPDX-License-Identifier: Apache-2.0
"""A dozen cases under compute-sanitizer. The three runs go side by side."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .results import FAILED, PASSED, SKIPPED, Result, found_wrong
from .runner import Ended
from .tools import where
from .workers import PYTEST

_KERNELS = "tests/gpu/test_kernels.py::test_decode"
CASES: Mapping[str, tuple[Sequence[str], Mapping[str, str], Sequence[str]]] = {
    # PyTorch's cache would hide what lies beyond the end of a block.
    "memcheck, kernels": (
        ("--tool", "memcheck"),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        (
            f"{_KERNELS}[Q8_0-torch.float16-plain]",
            f"{_KERNELS}[Q4_K-torch.bfloat16-patched]",
            f"{_KERNELS}[Q6_K-torch.float32-plain]",
            f"{_KERNELS}[IQ4_XS-torch.bfloat16-plain]",
            f"{_KERNELS}[IQ2_XXS-torch.float16-patched]",
            f"{_KERNELS}[float8_e4m3fn-torch.bfloat16-patched]",
            f"{_KERNELS}[int8-torch.float32-plain]",
            f"{_KERNELS}[bfloat16-torch.bfloat16-patched]",
            "tests/gpu/test_kernels.py::test_dequantise[Q5_K-torch.float32]",
            "tests/gpu/test_kernels.py::test_dequantise[MXFP4-torch.bfloat16]",
        ),
    ),
    "memcheck, engine": (
        ("--tool", "memcheck"),
        {},
        (
            "tests/gpu/test_streams.py::test_other_streams[40000]",
            "tests/gpu/test_memory.py::test_empty_cache",
        ),
    ),
    # Only our kernels are to be judged.
    "racecheck": (
        ("--tool", "racecheck", "--kernel-name", "kns=distorch"),
        {},
        (
            f"{_KERNELS}[Q4_K-torch.float16-patched]",
            f"{_KERNELS}[float8_e5m2-torch.float32-patched]",
            f"{_KERNELS}[bfloat16-torch.float16-patched]",
        ),
    ),
}
_OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
_ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def command(*options: str) -> list[str] | None:
    """compute-sanitizer before a Python, or None where it is not."""
    found = where("compute-sanitizer")
    # PyTorch and the engine ask CUDA things that it may refuse; that is no error of a kernel.
    always = ("--error-exitcode", "9", "--target-processes", "all", "--report-api-errors", "no")
    return [found, *always, *options] if found else None


def checked(report: Any, limit: float) -> None:
    """Every case of every run gets a result."""
    if report.device == "sim":
        report.add(
            Result("sanitizer", SKIPPED, message="the simulated accelerator runs no kernels")
        )
    elif command() is None:
        report.add(Result("sanitizer", SKIPPED, message="there is no compute-sanitizer"))
    else:
        with concurrent.futures.ThreadPoolExecutor(report.side_by_side(len(CASES))) as threads:
            runs = {name: threads.submit(_run, report, name, limit) for name in CASES}
        for name, run in runs.items():
            _judge(report, name, run.result())


def _run(report: Any, name: str, limit: float) -> Ended:
    options, env, tests = CASES[name]
    pytest = (*PYTEST[: PYTEST.index("-q")], "-v", *PYTEST[PYTEST.index("-q") + 1 :])
    whole = [*(command(*options) or []), *pytest, *tests]
    ended: Ended = report.run(f"sanitizer: {name}", whole, limit, env)
    return ended


def _judge(report: Any, name: str, ended: Ended) -> None:
    """A run that was cut short counts for the cases that it had done."""
    outcomes = dict(_OUTCOME.findall(ended.log))
    log = ended.log  # goes into the files once, not with every case
    for test in CASES[name][2]:
        part = f"{test} ({name})"
        if outcomes.get(test) == "PASSED":
            report.add(Result("sanitizer", PASSED, part))
        elif test not in outcomes and ended.timed_out:
            report.add(Result("sanitizer", SKIPPED, part, message="did not fit into the time"))
        else:
            told = f"{outcomes.get(test, 'not run').lower()}: {found_wrong(ended.log) or ended.how}"
            report.add(Result("sanitizer", FAILED, part, message=told, text=log))
            log = ""
    errors = [count for count in _ERRORS.findall(ended.log) if count != "0"]
    if errors or (ended.status == 9 and not ended.timed_out):
        message = (
            f"compute-sanitizer: {', '.join(errors) or 'some'} errors: {found_wrong(ended.log)}"
        )
        report.add(Result("sanitizer", FAILED, f"errors ({name})", message=message, text=log))
