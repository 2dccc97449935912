# SPDX-License-Identifier: Apache-2.0
"""What the system says of NVIDIA's driver and GPUs, even if PyTorch sees none of them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from distorch import _library, _native

_DRIVER = Path("/proc/driver/nvidia/version")
_LIBRARY = "libcuda.so.1"  # comes with the driver; WSL and Jetson have it, too
_PCI = Path("/sys/bus/pci/devices")
_UNKNOWN = "of an unknown version"
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor; beginning of the class of a device


def driver() -> str | None:
    """The version of the driver, such as "580.65.06"; None if there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _DRIVER.read_text())
    except OSError:
        return _UNKNOWN if driver_cuda() is not None else None
    return found[1] if found is not None else _UNKNOWN


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run, such as (13, 0); None without the driver's library.

    A container that was started without GPUs may show the driver, and not have its library.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def has_gpu() -> bool:
    """Whether a GPU of NVIDIA is in this machine, with or without a driver."""
    if driver() is not None:
        return True
    for device in _PCI.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def kernels() -> str:
    """Whether our kernels for GPUs were built, and how."""
    if not _native.CUDA_LIBRARY.is_file():
        return "not built"
    built = _library.kernels_of(_native.CUDA_LIBRARY)
    if built is None:
        return "built"
    release, architectures = built
    return f"built with {release} for GPUs of {', '.join(map(_capability, architectures))}"


def versions() -> dict[str, str]:
    """CUDA of torch, driver, kernels, and each GPU that torch sees with its capability."""
    cuda, newest = torch.version.cuda, driver_cuda()
    up_to = f", up to CUDA {newest[0]}.{newest[1]}" if newest is not None else ""
    found = {
        "CUDA of torch": cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "none"),
        "NVIDIA driver": (driver() or "none") + up_to,
        "CUDA kernels": kernels(),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)} ({major}.{minor})"
    return found


def _capability(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"
