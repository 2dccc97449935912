# SPDX-License-Identifier: Apache-2.0
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
        "distorch.devices": lambda: len(distorch.devices()),
        "distorch.plan": lambda: distorch.plan(module, "cuda:0,50%;cpu,*") and None,
    }
    found: dict[str, Any] = {}
    wrong, before = [], set(_present())
    for name, step in steps.items():
        gave = said(step)
        present = set(_present())
        found[name] = {"gave": gave, "contexts on": sorted(present)}
        # Where weights are to be placed, free memory is asked of CUDA, which makes a context.
        new = present - before - ({0} if name == "distorch.plan" else set())
        if new and name in ("distorch.devices", "distorch.plan"):
            wrong.append(f"{name} made contexts on {sorted(new)}, where nothing is placed")
        before = present
    return {"after": found, "wrong": wrong}


def _present() -> list[int]:
    return [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]
