"""Which of our calls make a context on a GPU, which takes hundreds of megabytes there."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

import distorch
from distorch import _native

from .cudart import said


def contexts(_: torch.device) -> dict[str, Any]:
    """After each step, the GPUs that have a context. `import distorch` is the first step."""
    library = Path(distorch.__file__).parent / "_cuda.so"
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    steps = {
        "import distorch": lambda: None,
        "loading _cuda.so": lambda: ctypes.CDLL(str(library)) and None,
        "asking for kernels": lambda: bool(_native.has_cuda_kernels()),
        "distorch.plan": lambda: distorch.plan(module, "cuda:0,50%;cpu,*") and None,
        "distorch.devices": lambda: len(distorch.devices()),
    }
    found = {}
    for name, step in steps.items():
        gave = said(step)
        found[name] = {"gave": gave, "contexts on": _present()}
    return {"after": found}


def _present() -> list[int]:
    return [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]
