# SPDX-License-Identifier: Apache-2.0
"""What this machine has, and what would stop distorch from working, with the remedy."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import distorch
from distorch import _native
from distorch._tables import human_bytes, text_table
from distorch.runtime import machine
from distorch.runtime.links import Calibration, known_links

_LOW_DISK_BYTES = 1 << 30


@dataclass(frozen=True)
class Findings:
    """Versions, devices (total and free bytes), checks (name, passed, remedy)."""

    versions: dict[str, str]
    devices: dict[str, tuple[int, int]]
    scratch: str
    checks: list[tuple[str, bool, str]]
    links: Calibration | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(passed for _, passed, _ in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON types."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        devices = [
            (name, human_bytes(total), human_bytes(free))
            for name, (total, free) in self.devices.items()
        ]
        checks = [
            ("ok" if passed else "NO", name, "" if passed else remedy)
            for name, passed, remedy in self.checks
        ]
        return "\n\n".join(
            [
                text_table(("what", "version"), list(self.versions.items())),
                text_table(("device", "total", "free"), devices),
                f"donor files go to {self.scratch}",
                str(self.links or "links were not measured yet: distorch calibrate"),
                text_table(("", "check", "what to do"), checks),
            ]
        )


def _versions() -> dict[str, str]:
    found = {"distorch": distorch.__version__, "python": platform.python_version()}
    found["CUDA of torch"] = torch.version.cuda or "none: built for CPUs"
    found["CUDA kernels"] = "built" if _native.CUDA_LIBRARY.is_file() else "not built"
    for package in ("torch", "safetensors", "numpy", "transformers", "diffusers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _same_bits(donor: str) -> bool:
    weight, x = torch.randn(64, 64), torch.randn(8, 64)
    sharded = distorch.shard(weight, donor)
    return torch.equal(
        torch.nn.functional.linear(x, sharded), torch.nn.functional.linear(x, weight)
    )


def _unbuffered_reads(folder: str) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()
        try:
            os.close(os.open(file.name, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
        except OSError:
            return False
    return hasattr(os, "O_DIRECT")


def _disk_checks(scratch: str, free_bytes: int) -> list[tuple[str, bool, str]]:
    in_memory = _native.in_memory(Path(scratch))
    return [
        ("donor files go to a disk, not to RAM", not in_memory,
         "set DISTORCH_DISK to a folder on a disk: this one takes RAM"),
        ("a weight on disk gives the same bits", _same_bits("disk"), "set DISTORCH_DISK to a disk"),
        ("the disk reads past the page cache", _unbuffered_reads(scratch),
         "works, but slower: set DISTORCH_DISK to a folder on ext4, xfs or btrfs"),
        ("the disk has room", free_bytes > _LOW_DISK_BYTES,
         "set DISTORCH_DISK to a folder on a disk with room"),
    ]  # fmt: skip


def gpu_checks() -> list[tuple[str, bool, str]]:
    """What a torch for CUDA needs: name, passed, remedy."""
    build = "DISTORCH_CUDA=1 pip install --force-reinstall --no-deps ."
    checks = [("torch sees a GPU", torch.cuda.is_available(), "nvidia-smi shows GPU and driver")]
    if torch.cuda.is_available():
        checks.append(
            ("the CUDA kernels load", _native.has_cuda_kernels(),
             f"without them, quantised weights do not run on a GPU: {build}")
        )  # fmt: skip
    return checks


def examine() -> Findings:
    """Looks at the machine and runs a small weight through every donor."""
    scratch = _native.scratch_directory()
    devices = {name: (d.total_bytes, d.free_bytes) for name, d in machine.devices().items()}
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    checks = [
        ("torch is 2.11 or newer", version >= (2, 11), "upgrade torch, then build distorch again"),
        ("a weight in RAM gives the same bits", _same_bits("cpu"), "report this as a bug"),
        ("the folder for donor files is there", "disk" in devices,
         f"make {scratch!r}, or set DISTORCH_DISK to a folder on a disk"),
    ]  # fmt: skip
    if torch.version.cuda is not None:
        checks += gpu_checks()
    if "disk" in devices:
        checks += _disk_checks(scratch, free_bytes=devices["disk"][1])
    return Findings(_versions(), devices, scratch, checks, known_links())
