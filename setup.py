# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled library against the torch that is installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent
MAX_JOBS = os.environ.get("MAX_JOBS", "0")  # 0: as many as there are processors
# csrc/tests are programs.
ROOMS = ("core", "engine", "rehearsal", "placement", "device", "hook", "ops", "bindings")
# The simulated accelerator is a library of its own, which `import distorch` never loads.
SIM_ROOMS = ("sim",)
SHARED_WITH_SIM = ("csrc/core/arena.cpp", "csrc/core/virtual_time.cpp")
# Compiled alone, not in the unit of their room. They take a minute, or they have pragmas for the
# optimiser, which would also apply to the files that the unit includes after them.
ALONE = ("dequantise", "merge", "decode", "rotation")
# GPUs that the kernels are compiled for; the last one also as PTX, for those to come.
GPUS = ("75", "80", "86", "89", "90", "100", "120")
CUDA_SOURCES = (
    "csrc/core/blocks.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu")),
)
OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 0)
NO_TORCH = """\
distorch is built against your torch, and there is none in this environment.
  1. Install torch: https://pytorch.org/get-started/locally
  2. Install distorch again, with the same Python.
If torch is there, your installer hides it from builds, as uv does. Then, in distorch's folder:
       pip install "setuptools>=77" ninja && pip install --no-build-isolation .
  (or: uv pip install "setuptools>=77" ninja && uv pip install --no-build-isolation .)
  (or, for a wheel: python -m build --no-isolation)"""

WHERE_TORCH_IS = """
import importlib.util, sys
if importlib.util.find_spec("torch"):
    print(*sys.path[1:], sep="\\n")  # [0] is the folder it was started in
"""


def find_torch():
    """The torch to build against, or None.

    pip builds in an environment of its own, and hides the one that it installs into. It does so by
    environment variables: without them, the same Python tells where its packages are. These
    folders go behind the build's own.
    """
    try:
        import torch
    except ImportError:
        hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
        plain = {name: value for name, value in os.environ.items() if name not in hiding}
        done = subprocess.run(
            [sys.executable, "-c", WHERE_TORCH_IS],
            cwd="/", env=plain, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not done.stdout.strip():
            return None
        sys.path += done.stdout.splitlines()
        import torch
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise SystemExit(
            f"distorch needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and this "
            f"environment has torch {torch.__version__}: pip install --upgrade torch"
        )
    return torch


def choice(name, default, known):
    """What an environment variable says. SystemExit on what it cannot mean."""
    value = os.environ.get(name, default).lower()
    if value not in known:
        raise SystemExit(f"{name}={value!r}: expected {', '.join(known[:-1])} or {known[-1]}")
    return value


SANITIZER = choice("DISTORCH_SANITIZE", "none", ("none", "address", "thread"))
SANITIZED = [] if SANITIZER == "none" else [f"-fsanitize={SANITIZER}"]

TORCH = find_torch()
if TORCH is None:  # a source distribution can be made, and metadata read
    BuildExtension, OBJECTS = build_ext, ROOT / "build" / "without-torch"
else:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # Compilers and setuptools look at the age of files, and the headers of a torch that was
    # installed today may be older than what was compiled yesterday. In one folder for all, a build
    # after an upgrade of torch would find nothing to do.
    OBJECTS = ROOT / "build" / f"torch-{TORCH.__version__}-{sys.implementation.cache_tag}"
    if SANITIZED:
        OBJECTS = OBJECTS.with_name(f"{OBJECTS.name}{SANITIZED[0]}")


def check_system():
    """SystemExit where distorch cannot be built."""
    if sys.platform != "linux":
        raise SystemExit(
            f"distorch runs on Linux only, and this is {sys.platform}: its engine uses calls for "
            "files and memory that only Linux has"
        )
    if TORCH is None:
        raise SystemExit(NO_TORCH)
    check_compiler(os.environ.get("CXX", "c++"))


def check_compiler(compiler):
    """SystemExit if that is no compiler, or too old a one."""
    wanted = "distorch needs a C++20 compiler, such as g++ 12. CXX=... names another one"
    try:
        done = subprocess.run(
            [*compiler.split(), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"],
            input="#include <bit>\n#include <concepts>\n#include <span>\n",
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise SystemExit(f"{wanted}. There is no {compiler}: install g++") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()[:1] or [f"it ended with {done.returncode}"]
        raise SystemExit(f"{wanted}. {compiler} is none, or is too old: {said[0]}")


def toolkit_release(compiler):
    """The release of the CUDA Toolkit that an nvcc belongs to, such as (13, 0)."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(release[1]), int(release[2])) if release is not None else None


def check_toolkit(compiler):
    """SystemExit if that is the nvcc of a CUDA Toolkit that is too old."""
    release = toolkit_release(compiler)
    if release is not None and release < OLDEST_CUDA:
        raise SystemExit(
            f"the kernels for GPUs need the CUDA Toolkit {OLDEST_CUDA[0]} or newer, and {compiler} "
            f"is of {release[0]}.{release[1]}: name a newer one by CUDA_HOME, or leave the kernels "
            "out with DISTORCH_CUDA=0"
        )


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
    return found if TORCH.version.cuda is not None else None


def chosen_gpus():
    """The compute capabilities that the kernels are compiled for, such as 89."""
    return os.environ.get("DISTORCH_GPUS", " ".join(GPUS)).split()


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
    check_toolkit(compiler)
    gpus = chosen_gpus()
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
    if TORCH is None:
        return Extension(name, [])
    whole = [path for room in rooms for path in (ROOT / "csrc" / room).glob("*.cpp")]
    return CppExtension(
        name,
        [*(unit for room in rooms for unit in units(room)), *more],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(p.relative_to(ROOT)) for p in (*(ROOT / "csrc").rglob("*.h"), *whole)],
        extra_link_args=SANITIZED,
        extra_compile_args=[
            "-std=c++20",
            "-O2",
            # GCC inlines less in what it takes for a large unit: 50 ns for each operator.
            "--param=large-unit-insns=1000000",
            *(["-g1", "-O1", *SANITIZED] if SANITIZED else ["-g0"]),
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
        found.append(extension("distorch.testing._sim", SIM_ROOMS, SHARED_WITH_SIM))
    return found


class Fresh(build):
    """Removes modules that an earlier build left, and that the sources no longer have."""

    def run(self):
        for file in Path(self.build_lib).rglob("*"):
            if file.is_file() and file.suffix != ".so":
                file.unlink()
        super().run()


class Build(BuildExtension):
    """The extensions, and the kernels for GPUs."""

    def run(self):
        check_system()
        # The next build goes on from there. pip would take a temporary folder.
        self.build_temp = str(OBJECTS)
        inplace = self.inplace or self.editable_mode
        folder = ROOT if inplace else Path(self.build_lib)
        notes = ROOT / "build" if inplace else folder.parent  # what is in build_lib is packed
        kernels = folder / "distorch" / "_cuda.so"
        if self.force:
            kernels.unlink(missing_ok=True)
        if not is_noted(notes / "torch.txt", OBJECTS.name):
            self.force = True
        if "distorch.testing._sim" not in [extension.name for extension in self.extensions]:
            # An old simulator does not fit a new library, and make is to build it again.
            name = f"_sim{sysconfig.get_config_var('EXT_SUFFIX')}"
            (folder / "distorch" / "testing" / name).unlink(missing_ok=True)
            if inplace:
                (Path(sys.prefix) / "dev-built").unlink(missing_ok=True)
        super().run()
        note(notes / "torch.txt", OBJECTS.name)
        self.add_kernels(kernels, notes / "kernels.txt")

    def add_kernels(self, target, noted):
        """The kernels, if they are wanted, and were not built in the same way already."""
        compiler = nvcc()
        if compiler is None:
            target.unlink(missing_ok=True)  # of an earlier build: it would be loaded
            return
        sources = [ROOT / source for source in CUDA_SOURCES]
        sources += sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh"))
        newest = max(path.stat().st_mtime for path in sources)
        made_by = f"{compiler} {toolkit_release(compiler)} {' '.join(chosen_gpus())}"
        if not target.exists() or not is_noted(noted, made_by) or target.stat().st_mtime < newest:
            build_kernels(compiler, target)
            note(noted, made_by)


def is_noted(file, text):
    """Whether the last build left this note."""
    return file.is_file() and file.read_text() == text


def note(file, text):
    """Leaves a note for the next build."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def label():
    """What DISTORCH_WHEEL_LABEL=1 adds to the version: the torch that a wheel was built for."""
    if TORCH is None or choice("DISTORCH_WHEEL_LABEL", "0", ("0", "1")) == "0":
        return ""
    minor = ".".join(TORCH.__version__.split(".")[:2])
    cuda = TORCH.version.cuda
    return f"+torch{minor}.{'cu' + cuda.replace('.', '') if cuda and nvcc() else 'cpu'}"


class Labelled(egg_info):
    """Metadata with the label. A source distribution has an empty one in its setup.cfg."""

    def finalize_options(self):
        self.tag_build = label() or self.tag_build
        super().finalize_options()


cuda_choice()
setup(
    ext_modules=extensions(),
    cmdclass={"build": Fresh, "build_ext": Build, "egg_info": Labelled},
    options={"build": {"build_base": os.path.relpath(OBJECTS, ROOT)}},
)
