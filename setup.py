"""Builds the compiled library against the torch that is installed."""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# csrc/tests are programs.
ROOMS = ("core", "engine", "device", "hook", "ops", "bindings")
# The simulated accelerator is a library of its own, which `import distorch` never loads.
SIM_ROOMS = ("sim",)


def check_cuda_choice() -> None:
    """DISTORCH_CUDA: 0 leaves the CUDA part out, auto takes what is there, 1 must have it."""
    choice = os.environ.get("DISTORCH_CUDA", "auto").lower()
    if choice not in {"0", "1", "auto"}:
        raise SystemExit(f"DISTORCH_CUDA={choice!r}: expected 0, 1 or auto")
    if choice == "1":  # csrc/cuda has kernels, and nothing that calls them
        raise SystemExit(
            "DISTORCH_CUDA=1: this version has no CUDA part yet. "
            "Build the CPU part with DISTORCH_CUDA=0 or auto"
        )


def extension(name, rooms, more=()):
    """An extension module from some rooms of csrc, and more single sources."""
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        raise SystemExit(
            "distorch is built against your torch, and there is none in this environment. "
            "Install torch first, then: pip install --no-build-isolation ."
        ) from error
    sources = [
        str(path.relative_to(ROOT))
        for room in rooms
        for path in sorted((ROOT / "csrc" / room).glob("*.cpp"))
    ]
    sources += more
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    return CppExtension(
        name,
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args=[
            "-std=c++20",
            "-O2",
            "-g0",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ],
    )


def commands():
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


check_cuda_choice()
setup(
    ext_modules=[
        extension("distorch._C", ROOMS),
        extension("distorch.testing._sim", SIM_ROOMS, ["csrc/core/arena.cpp"]),
    ],
    cmdclass=commands(),
)
