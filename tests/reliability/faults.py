# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.faults [--most N]: every system call of the library fails once.

One after another, each open, read, write, mapping, allocation and thread start of each operation
fails (`faults.cpp`, preloaded). Each time: the operation succeeds or raises a named error, the model
is as it was or as it was to be, to the bit, the same operation works afterwards, and no thread and
no open file is left.
"""

import argparse
import ctypes
import errno
import faulthandler
import gc
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.compiler import COMPILER

HERE = Path(__file__).parent
# Kind, as faults.cpp numbers them -> number, error, whether the library has to get along with it.
KINDS = {
    "open": (1, errno.EMFILE, False), "read": (2, errno.EIO, False), "interrupted read": (2, errno.EINTR, True),
    "short read": (3, 0, True), "end of file": (4, 0, False), "write": (5, errno.ENOSPC, False),
    "interrupted write": (5, errno.EINTR, True), "short write": (6, 0, True),
    "room": (7, errno.ENOSPC, False), "map": (8, errno.ENOMEM, False), "memory": (9, 0, False),
    "thread": (10, errno.EAGAIN, False),
}  # fmt: skip
OPERATIONS = (
    "load", "load with a LoRA", "load verified", "distribute", "to disk", "to RAM", "to both",
    "merge", "fetch", "background", "off", "step", "step verified", "undistribute", "save",
)  # fmt: skip
CRASH = "CRASH"
HANG = 60  # seconds after which an operation counts as one that hangs


def build(folder: Path) -> Path:
    """The library to preload."""
    made = folder / "faults.so"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-builtin", str(HERE / "faults.cpp"),
         "-o", str(made), "-ldl", "-pthread"],
        check=True,
    )  # fmt: skip
    return made


def run(most: int, operations=OPERATIONS, kinds=tuple(KINDS), progress=print) -> list[str]:
    """What broke. `most` faults of each kind in each operation, spread over all that there are."""
    broken, tried = [], Counter()
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name), Path(name, "scratch")
        scratch.mkdir()
        environment = {
            **os.environ, "LD_PRELOAD": str(build(folder)), "DISTORCH_DISK": str(scratch),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1", "DISTORCH_CHECK_LOCKS": "1",
        }  # fmt: skip
        for operation in operations:
            start = ("", 0)
            while start is not None:
                child = subprocess.run(
                    [sys.executable, "-W", "ignore", "-m", "tests.reliability.faults", "--child",
                     operation, "--most", str(most), "--kinds", ",".join(kinds), "--start",
                     f"{start[0]}:{start[1]}", "--folder", str(folder)],
                    env=environment, capture_output=True, text=True, timeout=1800, check=False,
                )  # fmt: skip
                lines = [line.split("\t") for line in child.stdout.splitlines() if "\t" in line]
                for kind, number, result in (line for line in lines if len(line) == 3):
                    if result != "begin":
                        tried[kind] += 1
                    if result not in ("begin", "named", "fine"):
                        broken.append(f"{operation}, {kind} {number}: {result}")
                start = None
                if child.returncode:  # it died in the last one that it had begun
                    last = lines[-1] if lines else ["?", "0", ""]
                    why = child.stderr.strip().splitlines()[-1:] or [f"signal {-child.returncode}"]
                    broken.append(f"{operation}, {last[0]} {last[1]}: {CRASH} {why[0]:.200}")
                    start = (last[0], int(last[1])) if lines else None
            progress(f"{operation}: {tried.total()} faults so far, {len(broken)} broke something")
        assert list(scratch.iterdir()) == [], "scratch is left"
    progress(dict(tried))
    return broken


# --- the child ---


class _Faults:
    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.fault_range.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        import distorch._C

        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(distorch._C.__file__) and " r-xp " in line:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                self._library.fault_range(begin, end)

    def arm(self, kind: int, which: int, error: int) -> None:
        self._library.fault_arm(kind, which, error)

    def disarm(self) -> int:
        return self._library.fault_disarm()


class _Operation:
    """An operation on a model in a known state, and the states that it may leave."""

    def __init__(self, victim, name: str) -> None:
        self._victim, self._name = victim, name

    def prepare(self) -> None:
        """The state that it begins with."""
        import distorch
        from distorch.formats.verify import forget
        from tests.reliability.victim import net

        v, name = self._victim, self._name
        v.module, v.loras = None, []
        gc.collect()
        forget(v.file)  # so that a load takes checksums
        if name == "distribute":
            v.module = net()
            return
        loras = [(v.lora, 1.0)] if name == "off" else []
        spec = {"to RAM": "disk,*", "to disk": "cpu,0b;disk,*"}.get(name, "cpu,50%;disk,*")
        v.module, v.loras = v._loaded(loras, spec, verify=name == "step verified"), loras
        if name == "to disk":  # weights that are in no file
            distorch.undistribute(v.module)
            distorch.distribute(v.module, "cpu,*", min_bytes=0, progress=False)

    def act(self) -> None:
        import distorch

        v, name = self._victim, self._name
        if name.startswith("load"):
            loras = [(v.lora, 1.0)] if "LoRA" in name else []
            v.module, v.loras = v._loaded(loras, verify="verified" in name), loras
        elif name == "distribute":
            distorch.distribute(v.module, "cpu,50%;disk,*", min_bytes=0, progress=False)
        elif name.startswith("to "):
            spec = {"to disk": "disk,*", "to RAM": "cpu,*", "to both": "cpu,20%;disk,*"}[name]
            distorch.redistribute(v.module, spec, progress=False)
        elif name in ("merge", "fetch", "background"):
            distorch.set_loras(v.module, [(v.lora, 1.0)], lora_mode=name)
            v.loras = [(v.lora, 1.0)]
            distorch.finish_merging(v.module)
        elif name == "off":
            distorch.set_loras(v.module, [])
            v.loras = []
        elif name == "undistribute":
            distorch.undistribute(v.module)
        elif name == "save":
            v.save()
        else:
            v.step()


def _one(faults: _Faults, operation: _Operation, victim, number: int, error: int, which: int,
         must_pass: bool) -> str:  # fmt: skip
    """ "named" or "fine", or what broke."""
    import torch

    import distorch

    faulthandler.dump_traceback_later(HANG, exit=True)
    operation.prepare()
    result = "fine"
    faults.arm(number, which, error)
    try:
        operation.act()
    except (distorch.errors.DistorchError, OSError, MemoryError) as error_:
        result = "named" if str(error_) else f"an error without words: {error_!r}"
    except RuntimeError as error_:
        known = "bad_alloc" in str(error_) or "new thread" in str(error_)
        result = "named" if known else f"{error_!r:.200}"
    except BaseException as error_:
        result = f"{error_!r:.200}"
    finally:
        faults.disarm()
    if must_pass and result != "fine":
        return f"it should get along with that: {result}"
    try:
        with torch.no_grad():
            placed = distorch.runtime.distribution.is_distributed(victim.module)
            if placed:
                # What ended a merging thread is told each time, and the model runs all the same.
                with suppress(MemoryError, RuntimeError, OSError):
                    distorch.finish_merging(victim.module)
            now = victim.module(victim.x)
            states = [name for name, wanted in victim.wanted.items() if torch.equal(now, wanted)]
            if not states:
                return f"wrong numbers after {result}"
            if result == "fine" and ("lora" if victim.loras else "") not in states:
                return "it has succeeded, and changed nothing"
            if placed and bool(distorch.report(victim.module).loras) != (states == ["lora"]):
                return f"after {result} the report does not say which LoRAs are on"
            operation.prepare()
            operation.act()
            if distorch.runtime.distribution.is_distributed(victim.module):
                victim.check()
    except BaseException as error_:
        return f"after {result} it does not go on: {error_!r:.200}"
    return result


def _child(parsed) -> None:
    from tests.reliability.victim import Victim, check_nothing_left, open_files

    victim, faults = Victim(Path(parsed.folder)), _Faults()
    operation = _Operation(victim, parsed.child)
    start_kind, _, start_number = parsed.start.rpartition(":")
    skipping = bool(start_kind)
    for kind in parsed.kinds.split(","):
        number, error, must_pass = KINDS[kind]
        first = 0
        if skipping and kind != start_kind:
            continue
        if skipping:
            first, skipping = int(start_number), False
        operation.prepare()
        faults.arm(number, 0, 0)
        operation.act()
        total = faults.disarm()
        step = max(1, total / parsed.most)
        files = None
        for i in range(min(total, parsed.most)):
            which = 1 + int(i * step)
            if which <= first:
                continue
            print(f"{kind}\t{which}\tbegin", flush=True)
            result = _one(faults, operation, victim, number, error, which, must_pass)
            faulthandler.cancel_dump_traceback_later()
            victim.module = None
            gc.collect()
            try:
                check_nothing_left()
                files = files or open_files()
                assert open_files() <= files + 1, f"{open_files() - files} open files are left"
            except AssertionError as left:
                result = f"after {result}: {left}"
            print(f"{kind}\t{which}\t{result}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=40, help="of each kind in each operation (40)")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    for hidden in ("--child", "--start", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        _child(parsed)
        return 0
    broken = run(parsed.most, parsed.operations.split(","), tuple(parsed.kinds.split(",")))
    print("\n".join(broken) or "nothing broke")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
