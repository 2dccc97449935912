# SPDX-License-Identifier: Apache-2.0
"""What this machine has, and what would stop distorch from working, with the remedy.

`nvidia` knows what the system says of GPUs. `gpus` and `disks` are the checks.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import distorch
from distorch import _native
from distorch.cli.doctor import disks, gpus, nvidia
from distorch.cli.doctor.findings import Findings
from distorch.machine import machine
from distorch.machine.links import known_links


def examine() -> Findings:
    """Looks at the machine, and tries a small weight on every donor. Takes a few seconds."""
    scratch = _native.scratch_directory()
    devices = {name: (d.total_bytes, d.free_bytes) for name, d in machine.devices().items()}
    accelerators = [name for name in devices if name not in ("cpu", "disk")]
    checks = [
        *gpus.checks(accelerators),
        gpus.bits_check("cpu", "cpu"),
        *disks.checks(Path(scratch), accelerators),
    ]
    return Findings(_versions(), devices, scratch, checks, known_links())


def _versions() -> dict[str, str]:
    found = {"distorch": distorch.__version__, "python": platform.python_version()}
    for package in ("torch", "safetensors", "numpy", "transformers", "diffusers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | nvidia.versions()
