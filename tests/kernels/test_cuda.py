"""The CUDA kernels compile for every supported GPU, within their registers; and are found.

Their bodies run on the host in csrc/tests.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler import COMPILER

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(set((CSRC / "cuda").glob("*.cu")) - {CSRC / "cuda" / "library.cu"})
GPUS = ["75", "80", "86", "89", "90", "100", "120"]
# Half of a GPU's threads or more at work; a quarter for merges, whose sums are in registers.
MOST_REGISTERS = {"dequantise.cu": 64, "merge.cu": 128, "numbers.cu": 64}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
    done = subprocess.run(
        ["nvcc", "-std=c++20", "-c", f"-I{CSRC}", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra",
         *targets, str(source), "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) >= len(GPUS)
    assert max(registers) <= MOST_REGISTERS[source.name]
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(memory) == len(registers)
    assert set(memory) == {("0", "0")}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
def test_one_library_of_all_kernels(tmp_path):
    """It loads where there is no GPU, and says so when it is asked for memory."""
    copied = tmp_path / "distorch"
    shutil.copytree(CSRC, copied / "csrc", ignore=shutil.ignore_patterns("tests"))
    shutil.copy(CSRC.parent / "setup.py", copied)
    program = "import sys; sys.argv[1:] = ['--name']; import setup, pathlib; setup.build_kernels(setup.nvcc(), pathlib.Path('_cuda.so').absolute())"
    settings = {"DISTORCH_CUDA": "1", "DISTORCH_GPUS": "80", "MAX_JOBS": "2"}
    subprocess.run(
        [sys.executable, "-c", program], cwd=copied, env={**os.environ, **settings}, check=True
    )
    assert ctypes.CDLL(str(copied / "_cuda.so")).distorch_cuda_kernels() != 0
    sections = subprocess.run(
        ["readelf", "-SW", str(copied / "_cuda.so")], capture_output=True, text=True, check=True
    ).stdout
    assert ".nv_fatbin" in sections


def host_kernels(folder, version):
    """A library with the same table, made of the host's kernels."""
    target = folder / f"kernels_{version}.so"
    sources = [CSRC / "tests" / "host_kernels.cpp", *sorted((CSRC / "core").glob("*.cpp"))]
    subprocess.run(
        [COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", "-pthread",
         f"-I{CSRC}", f"-DVERSION={version}", *map(str, sources), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


PROGRAM = """
import sys, torch, distorch
from distorch import _C, _native, _ops
_C.set_cuda_library(sys.argv[1])
gpu = torch.device("cuda:0")
assert _ops.can_decode(gpu) == (sys.argv[2] == "found")
if sys.argv[2] == "found":
    slab = _ops.pinned_memory(12345, gpu)
    assert slab.untyped_storage().nbytes() == 12345 and slab.unique().tolist() == [7]
    del slab
    try:
        _ops.pinned_memory(1 << 21, gpu)
    except RuntimeError as error:
        assert "CUDA says 'out of memory'" in str(error)
    else:
        raise AssertionError("no error")
"""


def test_the_library_is_found(tmp_path):
    for version, outcome in ((1, "found"), (0, "of another build")):
        path = host_kernels(tmp_path, version)
        subprocess.run([sys.executable, "-c", PROGRAM, str(path), outcome], check=True)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "none.so"), "absent"], check=True)
