# SPDX-License-Identifier: Apache-2.0
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

from tests.amount import ALL
from tests.compiler import COMPILER

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(set((CSRC / "cuda").glob("*.cu")) - {CSRC / "cuda" / "library.cu"})
GPUS = ["75", "80", "86", "89", "90", "100", "120"] if ALL else ["75", "90", "120"]
# Half of a GPU's threads or more at work; a quarter for merges, whose sums are in registers.
MOST_REGISTERS = {"dequantise.cu": 64, "merge.cu": 128, "numbers.cu": 64, "rotation.cu": 32}


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


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    """(version, driver) -> a library with the same table, made of the host's kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    compiling = [COMPILER, "-std=c++20", "-O0", "-fPIC", "-DDISTORCH_ONE_PATH", f"-I{CSRC}"]
    core = sorted((CSRC / "core").glob("*.cpp"))
    subprocess.run([*compiling, "-c", *map(str, core)], cwd=folder, check=True)
    objects = [str(folder / f"{source.stem}.o") for source in core]

    def build(version, driver):
        target = folder / f"kernels_{version}_{driver}.so"
        source = str(CSRC / "tests" / "host_kernels.cpp")
        subprocess.run(
            [*compiling, "-shared", "-pthread", f"-DVERSION={version}", f"-DDRIVER={driver}",
             source, *objects, "-o", str(target)],
            check=True,
        )  # fmt: skip
        return target

    return build


PROGRAM = """
import ctypes, sys, torch, distorch
from distorch import _C, _native, _ops
_C.set_cuda_library(sys.argv[1])
gpu = torch.device("cuda:0")
assert _ops.can_decode(gpu) == (sys.argv[2] == "found")
if sys.argv[2] == "found":
    slab = _ops.pinned_memory(12345, gpu)
    assert slab.untyped_storage().nbytes() == 12345 and slab.unique().tolist() == [7]
    assert slab.data_ptr() % 4096 == 0  # though the library gives memory that is not
    library = ctypes.CDLL(sys.argv[1])
    assert library.pieces_pinned() == 1
    del slab
    assert library.pieces_pinned() == 0
    try:
        _ops.pinned_memory(1 << 21, gpu)
    except RuntimeError as error:
        assert "CUDA says 'out of memory'" in str(error)
    else:
        raise AssertionError("no error")
elif torch.version.cuda is None:
    try:
        _ops.pinned_memory(1, gpu)
    except RuntimeError as error:
        assert "this PyTorch has no pinned memory for cuda" in str(error)
    else:
        raise AssertionError("no error")
"""


def test_the_library_is_found(host_kernels, tmp_path):
    cases = ((4, 13, "found"), (3, 13, "of another build"), (4, 12, "newer than the driver"))
    for version, driver, outcome in cases:
        path = host_kernels(version, driver)
        subprocess.run([sys.executable, "-c", PROGRAM, str(path), outcome], check=True)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "none.so"), "absent"], check=True)


# On the simulator's memory, whose place on the host the library is told, CUDA's kernels of our
# operators are called as the dispatcher would: what passes to the library is all but the GPU's.
CALLS = """
import ctypes, sys, torch
from distorch import _C, _ops
from distorch.testing import _sim, sim
from tests.accelerator import kernels

_C.set_cuda_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
library.stream_of_last_call.restype = ctypes.c_void_p
sim.configure(devices=2, mode="eager")
_C.set_decode_kernel("sim", _C.decode_kernel("cuda"))
device = torch.device("sim:1")
probe = torch.empty(1, dtype=torch.uint8, device=device)
library.set_distance(ctypes.c_int64(_sim.real_address(probe.data_ptr()) - probe.data_ptr()))
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
ops = torch.ops.distorch

for code in ("float32", "bfloat16", "float8_e4m3fn", "int8", "Q8_0", "Q6_K"):
    for patched in (False, True):
        rows, terms = kernels.stored(code), kernels.terms() if patched else _ops.Terms()
        scales = torch.rand(5, 4)
        wanted = torch.empty(kernels.ROWS, kernels.COLUMNS, dtype=torch.bfloat16)
        _ops.decode(wanted, rows, code, scales=scales, block=(32, 128), terms=terms)
        got = torch.zeros_like(wanted, device=device)
        factors = [[factor.to(device) for factor in side] for side in (terms.ups, terms.downs)]
        finite = torch.ones(1, dtype=torch.bool, device=device)
        ops.decode_.default.redispatch(
            CUDA, got, rows.to(device), code, scales.to(device), [32, 128], *factors,
            terms.strengths, terms.first_rows, finite)
        kernels.assert_same_numbers(got, wanted)
        assert bool(finite) and library.device_of_last_call() == 1

for code in kernels.TURNED:
    for terms in (_ops.Terms(), kernels.terms()):
        rows, options = kernels.turned(code)
        wanted = torch.empty(kernels.ROWS, kernels.COLUMNS, dtype=torch.bfloat16)
        _ops.decode(wanted, rows, code, **options, terms=terms)
        got = torch.zeros_like(wanted, device=device)
        factors = [[factor.to(device) for factor in side] for side in (terms.ups, terms.downs)]
        scales, table = (
            options[name].to(device) if options[name] is not None else None
            for name in ("scales", "table"))
        ops.decode_.default.redispatch(
            CUDA, got, rows.to(device), code, scales, options["block"], *factors,
            terms.strengths, terms.first_rows, finite, table, options["rotation"])
        kernels.assert_same_numbers(got, wanted)

# More patches than travel with a launch.
terms = _ops.Terms()
for index in range(70):
    terms.add(torch.randn(kernels.ROWS, 1), torch.randn(1, kernels.COLUMNS), 0.1, 0)
rows = kernels.stored("bfloat16")
wanted = torch.empty(kernels.ROWS, kernels.COLUMNS, dtype=torch.bfloat16)
_ops.decode(wanted, rows, "bfloat16", terms=terms)
got = torch.zeros_like(wanted, device=device)
factors = [[factor.to(device) for factor in side] for side in (terms.ups, terms.downs)]
ops.decode_.default.redispatch(
    CUDA, got, rows.to(device), "bfloat16", None, [1, 1], *factors, terms.strengths,
    terms.first_rows, finite)
kernels.assert_same_numbers(got, wanted)

for name in ("F32", "F16", "BF16", "Q4_0", "Q4_K"):
    for dtype in kernels.DTYPES:
        blocks = kernels.blocks_of(name)
        there, wanted = blocks.to(device), _ops.dequantise(blocks, name, dtype)
        kernels.assert_same_numbers(
            ops.dequantise.default.redispatch(CUDA, there, name, dtype), wanted)
        into = torch.zeros_like(wanted, device=device)
        ops.dequantise_.default.redispatch(CUDA, into, there, name)
        kernels.assert_same_numbers(into, wanted)

here = library.stream_of_last_call()
with torch.Stream(device=device):
    ops.dequantise_.default.redispatch(CUDA, into, there, name)
assert library.stream_of_last_call() != here

up = torch.full((kernels.ROWS, 1), float("inf"), device=device)
down = torch.ones(1, kernels.COLUMNS, device=device)
ops.decode_.default.redispatch(
    CUDA, into, into, "bfloat16", None, [1, 1], [up], [down], [1.0], [0], finite)
assert not bool(finite)

unaligned = torch.zeros(34 * 4 + 4, device=device)[1 : 1 + 32]
try:
    ops.dequantise_.default.redispatch(CUDA, unaligned, there.view(-1)[:18], "Q4_0")
except ValueError as error:
    assert "aligned to 16 bytes" in str(error)
else:
    raise AssertionError("no error")
"""


def test_what_the_operators_ask_of_the_library(host_kernels):
    path = host_kernels(4, 13)
    subprocess.run([sys.executable, "-c", CALLS, str(path)], check=True, cwd=CSRC.parent)


def test_without_the_library_operators_say_so():
    call = "_C.set_decode_kernel('cpu', _C.decode_kernel('cuda')); torch.ops.distorch.dequantise.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.zeros(34, dtype=torch.uint8), 'Q8_0', torch.float32)"
    program = (
        f"import torch, distorch\nfrom distorch import _C\n_C.set_cuda_library('/nowhere')\n{call}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "distorch has no kernels for CUDA devices here" in done.stderr
