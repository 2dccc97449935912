# SPDX-License-Identifier: Apache-2.0
"""setup.py's settings, and that core needs no torch to compile and link."""

import ast
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import distorch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("choice", "message"), [("1", "there is no nvcc"), ("maybe", "expected 0, 1 or auto")]
)
def test_cuda_choice_is_checked(choice, message):
    program = "import sys; sys.argv[1:] = ['--version']; import setup; setup.nvcc()"
    settings = {"DISTORCH_CUDA": choice, "CUDA_HOME": "/nowhere", "PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stderr


def _compiler_in(folder):
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text("#!/bin/sh\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_nvcc_of_the_path_is_found_where_cuda_home_has_none(tmp_path):
    on_path = _compiler_in(tmp_path / "path")
    at_home = _compiler_in(tmp_path / "home" / "bin")
    program = "import sys; sys.argv[1:] = ['--version']; import setup; print(setup.nvcc())"
    for home, wanted in (("empty", on_path), ("home", at_home)):
        settings = {"DISTORCH_CUDA": "1", "CUDA_HOME": str(tmp_path / home), "CUDA_PATH": "",
                    "PATH": str(tmp_path / "path")}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == wanted


def test_units_have_every_file():
    program = (
        "import sys; sys.argv[1:] = ['--version']; import setup;"
        "print({room: setup.units(room) for room in (*setup.ROOMS, *setup.SIM_ROOMS)})"
    )
    found = {}
    for kind in ("rooms", "files"):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, "DISTORCH_UNITS": kind},
        )  # fmt: skip
        found[kind] = ast.literal_eval(done.stdout.splitlines()[-1])
    for room, files in found["files"].items():
        assert files == sorted(
            str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / room).glob("*.cpp")
        )
        *alone, unit = found["rooms"][room]
        included = re.findall(r'#include "(.*)"', (ROOT / unit).read_text())
        assert sorted([*alone, *(f"csrc/{name}" for name in included)]) == files


def test_a_source_distribution_can_build_everything(tmp_path):
    """The kernels for GPUs, too; not what was built here."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (packed,) = tmp_path.glob("distorch-*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for suffix in ("cpp", "h", "cu", "cuh")
        for path in (ROOT / "csrc").rglob(f"*.{suffix}")
        if "tests" not in path.parts
    }
    assert wanted and wanted <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith("build/") or name.endswith(".so")]


def test_kernels_without_their_sources_are_an_error(tmp_path):
    """Else there would be a library that loads, and has none."""
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    program = (
        "import sys, pathlib; sys.argv[1:] = ['--version']; import setup;"
        "setup.build_kernels('true', pathlib.Path('_cuda.so').absolute())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "DISTORCH_CUDA": "0"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "csrc/core/blocks.cpp is not there" in done.stderr
    assert not list(tmp_path.glob("_cuda.so*"))


@pytest.mark.parametrize("choice", ["0", "auto"])
def test_cpu_choices(choice):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env={**os.environ, "DISTORCH_CUDA": choice}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == distorch.__version__


def test_other_systems_are_refused_by_name():
    program = "import torch, sys; sys.platform = 'win32'; import distorch"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ImportError: distorch runs on Linux only, and this is win32" in done.stderr


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
