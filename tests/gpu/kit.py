# SPDX-License-Identifier: Apache-2.0
"""A build to carry to a machine with a GPU that has torch, but neither pip nor a registry.

`make gpu-kit` runs this. It makes a folder (`gpu-kit`, ignored by git) with

  distorch/   the compiled libraries, stripped: `_C`, `_sim` and the kernels, `_cuda.so`
  wheels/     the pure Python packages that such a machine lacks
  kit.json    what it was built for: Python's ABI, torch, GPUs, commit

which `python -m tests.gpu.report` uses from a plain `python3`. The libraries are imported, and the
quick suite runs with them, in a folder that holds nothing else that was built. Their symbols stay
in `out/gpu-kit/symbols`, for backtraces that come back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.report.workplace import read_kit, with_kit

ROOT = Path(__file__).parents[2]
WORK = ROOT / "out" / "gpu-kit"  # the environment, libraries with symbols
LIBRARIES = ("distorch/_C.{abi}.so", "distorch/testing/_sim.{abi}.so", "distorch/_cuda.so")
NEEDS = ("numpy", "safetensors", "psutil", "platformdirs", "tqdm")  # of `import distorch`
FOR_TESTS = ("pytest", "pytest-xdist", "hypothesis", "expecttest", "transformers>=5",
             "accelerate>=1", "peft>=0.17", "pillow", "requests", "pyyaml",
             "scikit-learn")  # fmt: skip
# psutil and numpy are not pure Python, so they are not carried.
CARRIED = ("gguf", "diffusers", "importlib_metadata", "platformdirs", "tqdm",
           "pytest", "pluggy", "iniconfig", "packaging", "pygments")  # fmt: skip
MOST_BYTES = 40 << 20
QUICK = ("tests/hook", "tests/runtime", "tests/planner", "tests/sim",
         "tests/architecture/test_build.py")  # fmt: skip


def run(*command: str | Path, **settings: Any) -> None:
    """Runs a command in the repository; ends the program where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([str(part) for part in command], check=False, **{"cwd": ROOT, **settings})
    if done.returncode:
        raise SystemExit(f"gpu-kit: {Path(str(command[0])).name} ended with {done.returncode}")


def asked(python: Path, expression: str) -> str:
    """What an expression gives in another Python, with `sys` and `sysconfig` at hand."""
    program = f"import sys, sysconfig; print({expression})"
    done = subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def working_python(name: str) -> str | None:
    """The path of a Python that starts: pyenv puts names on the PATH that do not."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(name), *sorted(map(str, versions.glob(f"*/bin/{name}")))):
        if (
            found
            and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0
        ):
            return found
    return None


def environment(python: str, torch: str) -> Path:
    """The Python of an environment with that torch; made once, and again for another torch."""
    folder = WORK / "venv"
    made, wanted = folder / "made-for", f"{python} {torch}"
    if not made.is_file() or made.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        run(folder / "bin/pip", "install", "--quiet", torch)
        made.write_text(wanted)
    return folder / "bin" / "python"


def install(python: Path, packages: tuple[str, ...]) -> None:
    """Installs packages, and leaves torch as it is."""
    held = WORK / "constraints.txt"
    version = asked(python, "__import__('importlib.metadata').metadata.version('torch')")
    held.write_text(f"torch=={version.partition('+')[0]}\n")
    run(python, "-m", "pip", "install", "--quiet", "-c", held, *packages)


def build(python: Path, gpus: str) -> Path:
    """The folder with the libraries, symbols included."""
    target = WORK / "symbols"
    run(python, "setup.py", "--quiet", "build_ext", "--build-lib", target,
        env={**os.environ, "DISTORCH_CUDA": "1", "DISTORCH_SIM": "1", "DISTORCH_GPUS": gpus, "MAX_JOBS": jobs()})  # fmt: skip
    return target


def jobs() -> str:
    return os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))


def fill(kit: Path, built: Path, abi: str) -> None:
    """The libraries, stripped."""
    for name in (library.format(abi=abi) for library in LIBRARIES):
        (kit / name).parent.mkdir(parents=True, exist_ok=True)
        run("strip", "--strip-unneeded", "-o", kit / name, built / name)


def download(python: Path, wheels: Path) -> None:
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "-d", wheels, *CARRIED)  # fmt: skip
    for wheel in wheels.iterdir():
        if not wheel.name.endswith("-none-any.whl"):
            raise SystemExit(f"gpu-kit: {wheel.name} is for one platform; expected pure Python")


def check(kit: Path, python: Path, quick: bool) -> None:
    """The libraries load, and the quick suite passes, with nothing else of ours."""
    folder = WORK / "check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = with_kit(kit, read_kit(kit), folder, lacks=lambda _: True)  # of that Python, not this
    settings = {"cwd": place.folder, "env": {**place.environment(), "CUDA_VISIBLE_DEVICES": ""}}
    # Not `distorch doctor`: it tries the kernels only where there is a GPU.
    load = "ctypes.CDLL(str(distorch._native.CUDA_LIBRARY))"
    run(python, "-c", f"import ctypes, distorch; from distorch.testing import sim; {load}",
        **settings)  # fmt: skip
    if not quick:
        return
    install(python, FOR_TESTS)
    run(python, "-c", "import gguf, diffusers", **settings)
    run(python, "-m", "pytest", "-q", "-n", jobs(), *QUICK, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="python3.12", help="to build for (python3.12)")
    parser.add_argument("--torch", default="torch==2.11.0", help="to build for (torch==2.11.0)")
    parser.add_argument("--gpus", default="90", help="compute capabilities (90: H100, H200)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-kit", help="(gpu-kit)")
    parser.add_argument("--no-tests", action="store_true", help="leave the quick suite out")
    options = parser.parse_args()
    starter = working_python(options.python)
    if starter is None:
        parser.error(f"--python {options.python}: expected a Python on the PATH, or its path")
    start = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    python = environment(starter, options.torch)
    install(python, ("setuptools>=77", "wheel", "ninja", *NEEDS))
    built = build(python, options.gpus)
    kit = options.out.resolve()
    shutil.rmtree(kit, ignore_errors=True)
    abi = asked(python, "sysconfig.get_config_var('SOABI')")
    fill(kit, built, abi)
    download(python, kit / "wheels")
    facts = {
        "abi": abi,
        "python": asked(python, "sys.version.split()[0]"),
        "torch": asked(python, "__import__('torch').__version__"),
        "gpus": options.gpus.split(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True,
                                 text=True, check=False).stdout.strip(),
    }  # fmt: skip
    (kit / "kit.json").write_text(json.dumps(facts, indent=1) + "\n")
    check(kit, python, quick=not options.no_tests)
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    print(f"{kit}: {size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s; {json.dumps(facts)}")
    if size > MOST_BYTES:
        raise SystemExit(f"gpu-kit: {size} bytes; expected at most {MOST_BYTES}")


if __name__ == "__main__":
    sys.exit(main())
