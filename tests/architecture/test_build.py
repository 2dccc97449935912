"""setup.py's settings, and that core needs no torch to compile and link."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler import COMPILER

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("choice", "message"), [("1", "there is no nvcc"), ("maybe", "expected 0, 1 or auto")]
)
def test_cuda_choice_is_checked(choice, message):
    program = "import sys; sys.argv[1:] = ['--version']; import setup; setup.nvcc()"
    settings = {"DISTORCH_CUDA": choice, "CUDA_HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("choice", ["0", "auto"])
def test_cpu_choices(choice):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env={**os.environ, "DISTORCH_CUDA": choice}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == "0.1.0"


def test_core_compiles_and_links_without_torch(tmp_path):
    """Every object of csrc/core into one shared library, with no name left open but libc's."""
    sources = sorted(map(str, (ROOT / "csrc" / "core").glob("*.cpp")))
    library = tmp_path / "libcore.so"
    compiler = COMPILER
    subprocess.run(
        [compiler, "-std=c++20", "-O0", "-fPIC", "-shared", "-Wl,--no-undefined", "-pthread",
         f"-I{ROOT / 'csrc'}", *sources, "-o", str(library)],
        check=True,
    )  # fmt: skip
    assert library.stat().st_size > 0


def test_sanitizing_without_the_sanitizer_says_so():
    done = subprocess.run(
        ["make", "sanitize-gpu", "SANITIZER=/nowhere/compute-sanitizer"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "there is no /nowhere/compute-sanitizer on the PATH" in done.stdout
    assert "pytest" not in done.stdout


def test_sanitizing_runs_every_tool():
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=dev", "sanitize-gpu", "SANITIZER=true"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = [line for line in done.stdout.splitlines() if "--tool" in line]
    assert [line.split("--tool ")[1].split()[0] for line in commands] == [
        "memcheck",
        "memcheck",
        "$tool",
    ]
    assert "for tool in racecheck initcheck synccheck" in done.stdout
