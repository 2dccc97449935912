# SPDX-License-Identifier: Apache-2.0
"""Dependencies point down only. Each rule is also shown a breach, and must see it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each folder of csrc may include (folders, or single files), and which libraries it may know.
CSRC = {
    "core": ({"core"}, set()),
    "engine": ({"engine", "core"}, set()),
    "rehearsal": ({"rehearsal", "engine", "core"}, set()),
    "placement": ({"placement", "core"}, set()),
    # ATen for one operator only: copy_, the one way to copy on any device's streams.
    # Of cuda, the table of its functions.
    "device": ({"device", "engine", "core", "cuda"}, {"c10", "ATen"}),
    "hook": ({"hook", "device", "engine", "core"}, {"c10", "ATen", "torch"}),
    "ops": ({"ops", "hook", "device", "engine", "core"}, {"c10", "ATen", "torch"}),
    "bindings": (
        {"bindings", "ops", "hook", "device", "placement", "rehearsal", "engine", "core"},
        {"c10", "ATen", "torch", "pybind11"},
    ),
    # Of device, what a kernel that decodes is told: the simulator registers one.
    "sim": ({"sim", "core", "device/decode.h"}, {"c10", "ATen", "torch", "pybind11"}),
    "cuda": ({"cuda", "core"}, {"cuda_runtime", "cuda_fp16", "cuda_bf16"}),
    "tests": ({"tests", "cuda", "placement", "rehearsal", "engine", "core"}, set()),
}
_LIBRARIES = {
    "torch", "ATen", "c10", "pybind11", "cuda", "cuda_runtime", "cuda_fp16", "cuda_bf16", "Python",
}  # fmt: skip
_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def _includes(csrc):
    for file in sorted(path for path in csrc.rglob("*") if path.suffix in _SUFFIXES):
        room = file.relative_to(csrc).parts[0]
        for kind, target in re.findall(r'^\s*#\s*include\s+(["<])([^">]+)', file.read_text(), re.M):
            yield file.relative_to(csrc), room, kind == '"', target


def cpp_breaches(csrc):
    found = []
    for file, room, ours, target in _includes(csrc):
        rooms, libraries = CSRC[room]
        first = target.split("/")[0].split(".")[0]
        allowed = first in rooms or target in rooms
        if (ours and not allowed) or (not ours and first in _LIBRARIES - libraries):
            found.append(f"{file} includes {target}")
    return found


def library_users(package):
    """Files that name the extension module or its operators."""
    pattern = re.compile(r"torch\.ops\.distorch|import _C\b|distorch\._C\b")
    return {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if pattern.search(file.read_text())
    }


def import_linter(folder):
    tool = Path(sys.executable).with_name("lint-imports")
    command = [str(tool), "--config", str(folder / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path):
    """The sources, to be broken."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors")
    for folder in ("distorch", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_cpp_layers():
    assert list(_includes(ROOT / "csrc"))
    assert cpp_breaches(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/arena.h", '#include "engine/ring.h"'),
        ("core/file.cpp", "#include <torch/library.h>"),
        ("core/file.cpp", "#include <c10/core/Storage.h>"),
        ("engine/ring.cpp", '#include "hook/call.h"'),
        ("engine/ring.cpp", '#include "rehearsal/stage.h"'),
        ("engine/ring.cpp", "#include <ATen/core/Tensor.h>"),
        ("hook/call.cpp", "#include <pybind11/pybind11.h>"),
        ("core/blocks.h", "#include <cuda_fp16.h>"),
        ("core/blocks.h", '#include "cuda/dequantise.cuh"'),
        ("cuda/dequantise.cu", "#include <torch/library.h>"),
        ("cuda/dequantise.cu", '#include "engine/ring.h"'),
        ("sim/device.cpp", '#include "device/accelerator.h"'),
    ],
)
def test_cpp_breach_is_seen(copied, file, line):
    path = copied / "csrc" / file
    path.write_text(line + "\n" + path.read_text())
    assert len(cpp_breaches(copied / "csrc")) == 1


def test_python_layers():
    kept, output = import_linter(ROOT)
    assert kept, output


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("planner/spec.py", "import torch"),
        ("planner/plan.py", "from distorch.runtime import machine"),
        ("formats/safetensors.py", "from distorch.loading import load"),
        ("_native.py", "from distorch import _ops"),
        ("runtime/groups.py", "import distorch.lora"),
        ("formats/stored.py", "from distorch.formats import packing"),
        ("patching/state.py", "if TYPE_CHECKING:\n    from distorch.patching import background"),
    ],
)
def test_python_breach_is_seen(copied, file, line):
    path = copied / "distorch" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    kept, output = import_linter(copied)
    assert not kept, output


def test_two_files_know_the_compiled_library():
    assert library_users(ROOT / "distorch") == {"_native.py", "_ops.py"}


def test_use_of_the_compiled_library_is_seen(copied):
    (copied / "distorch" / "report.py").write_text("torch.ops.distorch.sweep()\n")
    assert "report.py" in library_users(copied / "distorch")


@pytest.mark.parametrize(
    ("file", "lock", "told"),
    [
        ("core/virtual_reads.cpp", "", ""),
        ("core/virtual_reads.cpp", "  const MutexLock lock(mutex_);\n  reads_", "requires holding"),
        ("engine/ring.cpp", "  Lock lock(mutex_);\n  cache_", "requires holding mutex 'mutex_'"),
    ],
)
def test_locks(copied, file, lock, told):
    """`make lint-locks` passes a file as it is, and sees a lock that is not taken any more."""
    path = copied / "csrc" / file
    text = path.read_text()
    assert lock in text
    path.write_text(text.replace(lock, lock.rpartition("\n")[2], 1))
    done = subprocess.run(
        ["make", "lint-locks", f"LOCKING=csrc/{file}", f"VENV={sys.prefix}", "--assume-old=dev"],
        cwd=copied, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == bool(told), done.stdout + done.stderr
    assert told in done.stdout
