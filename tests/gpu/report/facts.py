# SPDX-License-Identifier: Apache-2.0
"""What the report was made on. Each fact is got by itself: one that fails says why.

The report calls `host()`, which imports nothing of torch; `python -m tests.gpu.report.facts` prints
what torch and distorch say, as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .tools import where

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "transformers", "diffusers", "accelerate", "gguf",
    "peft", "pytest", "psutil",
)  # fmt: skip
TOOLS = ("nvcc", "compute-sanitizer", "cuda-gdb", "gdb", "nvidia-smi", "g++", "gcc", "cc", "clang",
         "ninja")  # fmt: skip
NO_CUDA = 3  # the exit status where torch sees no device: building distorch would not help
_SETTINGS = ("CUDA_", "NVIDIA_", "PYTORCH_", "TORCH", "DISTORCH_", "NCCL_", "OMP_", "MKL_", "LD_")
_SMI = (
    "name", "driver_version", "memory.total", "memory.free", "pcie.link.gen.current",
    "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max", "compute_cap",
    "power.limit", "clocks.max.sm", "clocks.max.memory", "temperature.gpu", "ecc.mode.current",
    "compute_mode", "mig.mode.current",
)  # fmt: skip
_LINK = tuple(name for name in _SMI if name.startswith("pcie"))


def got(facts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    found = {}
    for name, fact in facts.items():
        try:
            found[name] = fact()
        except Exception as error:
            found[name] = f"not known: {type(error).__name__}: {error}"
    return found


def host(commit: str | None, root: Path) -> dict[str, Any]:
    """Facts that need no torch."""
    return got({
        "python": platform.python_version,
        "abi": lambda: sysconfig.get_config_var("SOABI"),
        "kernel": platform.release,
        "machine": platform.machine,
        "processor": _processor,
        "cores": os.cpu_count,
        "usable cores": lambda: len(os.sched_getaffinity(0)),
        "memory": lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory, available": _available,
        "locked memory limit": _locked,
        "packages": _packages,
        "tools": lambda: {tool: where(tool) for tool in TOOLS},
        "environment": _environment,
        "commit": lambda: commit or _commit(root),
        "gpus": _gpus,
    })  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "not told"


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise ValueError("the kernel does not tell")


def _locked() -> list[int]:
    import resource

    return list(resource.getrlimit(resource.RLIMIT_MEMLOCK))


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)}


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=4, check=True)
    return done.stdout.strip()


def _commit(root: Path) -> str:
    commit = _said("git", "-C", str(root), "rev-parse", "HEAD")
    return commit + (
        " and changes" if _said("git", "-C", str(root), "status", "-s", "-uno") else ""
    )


def _gpus() -> list[dict[str, str]]:
    """An older nvidia-smi refuses a query with a name that it does not know: then the few."""
    try:
        return _queried(_SMI)
    except subprocess.CalledProcessError:
        return _queried(_SMI[:3])


def links() -> Any:
    """How the cards' links are now. A card that idles tells a slower one than it has."""
    return got({"links": lambda: _queried(_LINK)})["links"]


def exclusive(gpus: Any) -> bool:
    """Whether a card lets one process in at a time."""
    return any("exclusive" in gpu.get("compute_mode", "").lower() for gpu in gpus)


def _queried(names: Sequence[str]) -> list[dict[str, str]]:
    text = _said("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return [
        dict(zip(names, (cell.strip() for cell in line.split(",")), strict=False))
        for line in text.splitlines()
    ]


def of_torch(device: str) -> dict[str, Any]:
    """Facts that need torch and distorch. ImportError where they do not load."""
    import torch

    import distorch
    from distorch import _native

    if device == "sim":
        import distorch.testing.sim  # noqa: F401
    return got({
        "torch": lambda: torch.__version__,
        "torch's CUDA": lambda: torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version,
        "distorch": lambda: distorch.__version__,
        "distorch's folder": lambda: str(Path(distorch.__file__).parent),
        "kernels for CUDA": lambda: bool(_native.has_cuda_kernels()),
        "devices": lambda: {name: vars(d) if hasattr(d, "__dict__") else str(d)
                            for name, d in distorch.devices().items()},
        "cards": lambda: [str(torch.cuda.get_device_properties(i))
                          for i in range(torch.cuda.device_count())],
        "peers": lambda: {f"{a}->{b}": torch.cuda.can_device_access_peer(a, b)
                          for a in range(torch.cuda.device_count())
                          for b in range(torch.cuda.device_count()) if a != b},
    })  # fmt: skip


def without_cuda() -> str:
    """Why torch sees no device, as far as its versions tell; "" if it sees one."""
    import torch

    from .health import driver_for

    if torch.cuda.is_available():
        return ""
    return (f"torch {torch.__version__}, which is built for CUDA {torch.version.cuda}, sees no "
            f"device; the driver is for CUDA {got({'': driver_for})['']}")  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(of_torch(sys.argv[1]), default=str), flush=True)
    trouble = without_cuda() if sys.argv[1] == "cuda" else ""
    if trouble:
        print(trouble)
        sys.exit(NO_CUDA)
