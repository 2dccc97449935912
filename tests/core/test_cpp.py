# SPDX-License-Identifier: Apache-2.0
"""The programs of csrc/tests: the rooms without torch, under sanitizers.

Each program has all objects of them, so that none of them needs a name of torch's.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.amount import ALL
from tests.compiler import COMPILER

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PROGRAMS = sorted(path.stem for path in (CSRC / "tests").glob("*_test.cpp"))
ROOMS = ("core", "engine", "rehearsal", "placement")  # without torch
SOURCES = sorted(path for room in ROOMS for path in (CSRC / room).glob("*.cpp"))
SANITIZERS = {"address": "address,undefined", "thread": "thread"}

# Unrolled by hand, so that a compiler needs a minute or two for each if it checks every access of
# every path. Beside the other programs one path is enough, without the checks for undefined
# behaviour: `make test-all` compiles them whole, and they know neither threads nor locks.
KERNELS = {"dequantise", "merge"}
# What a sanitizer cannot run.
UNFIT = {
    ("forks_test", "address"): "GCC's address sanitizer does not take its allocator's locks at a "
    "fork: a child waits for ever for a thread of its parent that was allocating",
}
SHORT_CHECKS = ["--param", "asan-instrumentation-with-call-threshold=0"]


@pytest.fixture(scope="module", params=SANITIZERS)
def library(request, tmp_path_factory):
    """A sanitizer, the flags for it, and all objects of these rooms, built with it."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = [COMPILER, "-std=c++20", "-O1", "-g1", "-pthread", f"-I{CSRC}"]
    flags = [*plain, f"-fsanitize={SANITIZERS[request.param]}", "-fno-sanitize-recover=all"]
    kernels = [*plain, "-DDISTORCH_ONE_PATH"]
    if request.param == "address":
        whole = [*flags, *SHORT_CHECKS]
        kernels = whole if ALL else [*kernels, "-fsanitize=address", *SHORT_CHECKS]
    jobs = [
        subprocess.Popen([
            *(kernels if source.stem in KERNELS else flags),
            "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
        ])
        for source in SOURCES
    ]  # fmt: skip
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    return request.param, flags, sorted(map(str, folder.glob("*.o")))


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(library, program, tmp_path):
    sanitizer, flags, objects = library
    if reason := UNFIT.get((program, sanitizer)):
        pytest.skip(reason)
    executable = tmp_path / program
    subprocess.run(
        [*flags, str(CSRC / "tests" / f"{program}.cpp"), *objects, "-o", str(executable)],
        check=True,
    )
    options = {
        "DISTORCH_CHECK_LOCKS": "1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [str(executable)], cwd=tmp_path, env={**os.environ, **options}, timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
