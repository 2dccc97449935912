# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.sanitized [PROGRAMS]: the programs of threads.py, and the C++ code of
distorch as a whole under GCC's thread sanitizer.

PyTorch itself is not compiled for the sanitizer. Where PyTorch orders two threads, the sanitizer
does not see that. Such reports are left out by name, below.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compiler import COMPILER
from tests.reliability import watchdog

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "thread"  # .../lib has the library
SUPPRESSED = """\
# The last reference to a tensor is counted down in PyTorch, where the sanitizer sees no atomics.
race:c10::TensorImpl::~TensorImpl
# The C library uses the memory of a thread that has ended for the next one.
race:_dl_deallocate_tls
"""
# PyTorch's engine for backward, at its own queues, tasks and nodes: one of the accesses is its own.
# (A suppression would also leave out whatever runs inside of a backward pass.)
OF_TORCH = re.compile(r"torch::autograd::(Engine|GraphTask|Node|ReadyQueue)")
_ACCESS = re.compile(
    r"^  (?:Previous )?(?:atomic )?(?:read|write) of size.*\n((?:    #.*\n)+)", re.MULTILINE | re.I
)


def build() -> Path:
    """The folder with the instrumented library, made anew where sources have changed."""
    env = {**os.environ, "DISTORCH_SANITIZE": "thread", "DISTORCH_SIM": "1", "DISTORCH_CUDA": "0"}
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(FOLDER / "lib")],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"the library cannot be built for the sanitizer:\n{made.stdout[-5000:]}")
    library = next((FOLDER / "lib" / "distorch").glob("_C.*.so"))
    assert b"__tsan_init" in library.read_bytes(), f"{library} is not compiled for the sanitizer"
    return FOLDER / "lib"


def is_ours(report: str) -> bool:
    """Whether distorch is to blame for what the sanitizer says."""
    for access in _ACCESS.findall(report):
        frames = [frame for frame in access.splitlines() if "libtsan" not in frame]
        if frames and OF_TORCH.search(frames[0]):
            return False
    return True


def run(programs: int, arguments: list[str], told=lambda text: None) -> list[str]:
    """The reports on distorch."""
    library = build()
    done = subprocess.run(
        [COMPILER, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    )
    # The sanitizer has fixed addresses, which a random layout of memory may take.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    with tempfile.TemporaryDirectory() as name:
        suppressed = Path(name, "suppressed.txt")
        suppressed.write_text(SUPPRESSED)
        options = f"suppressions={suppressed} log_path={name}/report exitcode=0 die_after_fork=0"
        watchdog.run(
            ["-m", "tests.reliability.threads", "--here", str(programs), *arguments],
            folder=FOLDER, before=fixed, told=told,
            env={
                "LD_PRELOAD": done.stdout.strip(), "TSAN_OPTIONS": options, "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{library}:{ROOT}",
            },
        )  # fmt: skip
        text = "".join(path.read_text(errors="replace") for path in Path(name).glob("report.*"))
    reports = [report for report in text.split("=" * 18) if "SUMMARY" in report]
    return [report for report in reports if is_ours(report)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="?", type=int, default=300, help="default 300")
    parser.add_argument("--seed", default="0", help="of the first program")
    given = parser.parse_args()
    reports = run(
        given.programs, ["--seed", given.seed], lambda text: print(text, end="", flush=True)
    )
    print("\n".join(reports))
    print(f"{len(reports)} reports of the sanitizer on distorch")
    return 1 if reports else 0


if __name__ == "__main__":
    sys.exit(main())
