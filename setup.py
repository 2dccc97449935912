"""Builds the compiled library against the torch that is installed."""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# csrc/cuda and csrc/sim are libraries of their own; csrc/tests are programs.
ROOMS = ("core", "engine", "hook", "ops", "bindings")


def want_cuda() -> bool:
    """DISTORCH_CUDA: 1 needs the toolkit, 0 leaves it, auto takes what is there."""
    choice = os.environ.get("DISTORCH_CUDA", "auto").lower()
    if choice not in {"0", "1", "auto"}:
        raise SystemExit(f"DISTORCH_CUDA={choice!r}: expected 0, 1 or auto")
    found = shutil.which("nvcc") is not None or "CUDA_HOME" in os.environ
    if choice == "1" and not found:
        raise SystemExit(
            "DISTORCH_CUDA=1 but there is no nvcc: put the CUDA toolkit's bin folder on PATH, "
            "or build the CPU part with DISTORCH_CUDA=0"
        )
    return found and choice != "0"


def extension():
    """The one extension module, distorch._C."""
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        raise SystemExit(
            "distorch is built against your torch, and there is none in this environment. "
            "Install torch first, then: pip install --no-build-isolation ."
        ) from error
    sources = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in sorted((ROOT / "csrc" / room).glob("*.cpp"))
    ]
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    return CppExtension(
        "distorch._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args=[
            "-std=c++20",
            "-O2",
            "-g0",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ],
    )


def commands():
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


want_cuda()
setup(ext_modules=[extension()], cmdclass=commands())
