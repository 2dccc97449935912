"""Builds the compiled library against the torch that is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
MAX_JOBS = os.environ.get("MAX_JOBS", "0")  # 0: as many as there are processors
# csrc/tests are programs.
ROOMS = ("core", "engine", "device", "hook", "ops", "bindings")
# The simulated accelerator is a library of its own, which `import distorch` never loads.
SIM_ROOMS = ("sim",)
# Compiled beside the unit of their room: they take a minute, or set how the compiler optimises,
# which would go on in the files behind them.
ALONE = ("dequantise", "merge", "decode", "rotation")


# GPUs that the kernels are compiled for; the last one also as PTX, for those to come.
GPUS = ("75", "80", "86", "89", "90", "100", "120")
CUDA_SOURCES = (
    "csrc/core/blocks.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu")),
)


def choice(name, default, known):
    """What an environment variable says. SystemExit on what it cannot mean."""
    value = os.environ.get(name, default).lower()
    if value not in known:
        raise SystemExit(f"{name}={value!r}: expected {', '.join(known[:-1])} or {known[-1]}")
    return value


def cuda_choice():
    """DISTORCH_CUDA: 0 leaves the kernels out, auto takes what is there, 1 must have them."""
    return choice("DISTORCH_CUDA", "auto", ("0", "1", "auto"))


def nvcc():
    """The compiler for the kernels, or None when they are not to be built."""
    wanted = cuda_choice()
    if wanted == "0":
        return None
    # Some images set CUDA_HOME to a folder that has no compiler: then the PATH is searched.
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [*(str(Path(home, "bin")) for home in homes), os.environ.get("PATH", os.defpath)]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if wanted == "1":
        if found is None:
            raise SystemExit(
                "DISTORCH_CUDA=1: there is no nvcc on the PATH or in CUDA_HOME. Install the CUDA "
                "Toolkit (12 or 13), or build the CPU part with DISTORCH_CUDA=0"
            )
        return found
    import torch

    return found if torch.version.cuda is not None else None


def build_kernels(compiler, target):
    """One library of all kernels, with its own CUDA runtime.

    It takes its name only when it is complete, so that a build that was stopped leaves none.
    """
    missing = [source for source in CUDA_SOURCES if not (ROOT / source).is_file()]
    if missing or not any(source.endswith(".cu") for source in CUDA_SOURCES):
        raise SystemExit(
            f"the kernels for GPUs cannot be built: {', '.join(missing) or 'csrc/cuda/*.cu'} is "
            "not there. Get the complete sources, or build the CPU part with DISTORCH_CUDA=0"
        )
    gpus = os.environ.get("DISTORCH_GPUS", " ".join(GPUS)).split()
    code = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus]
    code.append(f"-gencode=arch=compute_{gpus[-1]},code=compute_{gpus[-1]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        subprocess.run(
            [compiler, "-std=c++20", "-O2", "-shared", "-cudart", "static", f"-I{ROOT / 'csrc'}",
             "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", f"--threads={MAX_JOBS}",
             *code, *CUDA_SOURCES, "-o", str(unfinished)],
            cwd=ROOT, check=True,
        )  # fmt: skip
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def units(room):
    """The sources to compile for a room: its files in ALONE, and one unit that includes the others.

    In each source the headers of torch take ten seconds to compile, and our own code takes two.
    With DISTORCH_UNITS=files each file is a source, so that a change compiles only that file.
    """
    files = sorted((ROOT / "csrc" / room).glob("*.cpp"))
    alone = [path for path in files if path.stem in ALONE]
    if choice("DISTORCH_UNITS", "rooms", ("rooms", "files")) == "rooms":
        unit = ROOT / "build" / "units" / f"{room}.cpp"
        included = [path.relative_to(ROOT / "csrc") for path in files if path not in alone]
        text = "".join(f'#include "{path}"\n' for path in included)
        if not unit.exists() or unit.read_text() != text:  # else nothing is compiled again
            unit.parent.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
        files = [*alone, unit]  # the longest first
    return [str(path.relative_to(ROOT)) for path in files]


def extension(name, rooms, more=()):
    """An extension module from some rooms of csrc, and more single sources."""
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        raise SystemExit(
            "distorch is built against your torch, and there is none in this environment. "
            "Install torch first, then: pip install --no-build-isolation ."
        ) from error
    whole = [path for room in rooms for path in (ROOT / "csrc" / room).glob("*.cpp")]
    return CppExtension(
        name,
        [*(unit for room in rooms for unit in units(room)), *more],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(p.relative_to(ROOT)) for p in (*(ROOT / "csrc").rglob("*.h"), *whole)],
        extra_compile_args=[
            "-std=c++20",
            "-O2",
            # GCC inlines less in what it takes for a large unit: 50 ns for each operator.
            "--param=large-unit-insns=1000000",
            "-g0",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
        ],
    )


def extensions():
    """The library, and with DISTORCH_SIM=1 the simulated accelerator of tests and benchmarks."""
    found = [extension("distorch._C", ROOMS)]
    if choice("DISTORCH_SIM", "0", ("0", "1")) == "1":
        found.append(extension("distorch.testing._sim", SIM_ROOMS, ["csrc/core/arena.cpp"]))
    return found


def commands():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self):
            inplace = self.inplace or self.editable_mode
            if inplace:  # the next build goes on from there; pip would take a temporary folder
                self.build_temp = str(ROOT / "build" / "objects")
            folder = ROOT if inplace else Path(self.build_lib)
            if "distorch.testing._sim" not in [extension.name for extension in self.extensions]:
                # An old simulator does not fit a new library, and make is to build it again.
                name = f"_sim{sysconfig.get_config_var('EXT_SUFFIX')}"
                (folder / "distorch" / "testing" / name).unlink(missing_ok=True)
                (Path(sys.prefix) / "dev-built").unlink(missing_ok=True)
            super().run()
            compiler = nvcc()
            target = folder / "distorch" / "_cuda.so"
            if compiler is None:
                target.unlink(missing_ok=True)  # of an earlier build: it would be loaded
                return
            sources = [ROOT / source for source in CUDA_SOURCES]
            sources += sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh"))
            newest = max(path.stat().st_mtime for path in sources)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                build_kernels(compiler, target)

    return {"build_ext": Build}


cuda_choice()
setup(ext_modules=extensions(), cmdclass=commands())
