# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine as numbers."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable

import torch

from distorch import _native
from distorch._memory import host_memory
from distorch.machine.supposed import supposed
from distorch.planner import DeviceInfo

# The host of a dry run stores nothing.
_BOUNDLESS = 1 << 60


def _disk() -> dict[str, DeviceInfo]:
    try:
        usage = shutil.disk_usage(_native.scratch_directory())
    except OSError:  # DISTORCH_DISK names a folder that is not there
        return {}
    return {"disk": DeviceInfo("disk", usage.total, usage.free)}


def _has_context(kind: str, index: int) -> bool:
    """Whether this process uses the device already. Asking makes no context."""
    return kind != "cuda" or bool(torch._C._cuda_hasPrimaryContext(index))  # type: ignore[attr-defined]


def _memory(kind: str, index: int, place_there: bool) -> tuple[int, int]:
    """(free, total) bytes of an accelerator.

    To ask CUDA for free memory makes a context on that GPU, which takes hundreds of megabytes. So a
    GPU on which nothing is placed is asked through NVML, which makes none. Where that is not
    installed (nvidia-ml-py), all of the GPU's memory counts as free.
    """
    module = torch.get_device_module(kind)
    if place_there or _has_context(kind, index):
        free, total = module.mem_get_info(index)
        return free, total
    total = module.get_device_properties(index).total_memory
    try:
        # Of a slice of a GPU, NVML tells what the whole GPU has in use.
        return max(0, total - module.device_memory_used(index)), total
    except Exception:  # NVML is not installed, or refuses (containers, boards with shared memory)
        return total, total


def with_exact(known: dict[str, DeviceInfo], placed: Collection[str]) -> dict[str, DeviceInfo]:
    """The same devices, with the exact free memory of those on which something is placed.

    A device that this process uses already is known exactly.
    """
    if supposed() is not None:
        return known
    found = dict(known)
    for name in placed:
        kind, _, index = name.partition(":")
        if name in known and index and not _has_context(kind, int(index)):
            free, total = _memory(kind, int(index), place_there=True)
            found[name] = DeviceInfo(name, total, free)
    return found


def devices() -> dict[str, DeviceInfo]:
    """Every tier of this machine, or of the supposed one, with total and free bytes."""
    if (other := supposed()) is not None:
        return other.memory()
    found = {"cpu": DeviceInfo("cpu", *host_memory()), **_disk()}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            name = f"{accelerator.type}:{index}"
            free, total = _memory(accelerator.type, index, place_there=False)
            found[name] = DeviceInfo(name, total, free)
        if not needs_values(torch.device(accelerator.type)):
            found["cpu"] = DeviceInfo("cpu", _BOUNDLESS, _BOUNDLESS)
    return found


def synchronize_all(places: Iterable[str]) -> None:
    """Waits for all accelerators among places such as "cpu", "disk", "cuda:0", "cpu+cuda:1".

    For weights that operators use where they are. A forward on another stream may still read the
    old ones, or be the first to read the new ones, and nobody but its owner knows that stream.
    """
    for device in {part for place in places for part in place.split("+") if ":" in part}:
        synchronize(device)


def synchronize(place: str) -> None:
    """Waits until an accelerator, such as "cuda:0", has done all that it was given.

    torch.accelerator.synchronize does not reach devices that were registered at run time before
    PyTorch 2.13.
    """
    device = torch.device(place)
    with torch.accelerator.device_index(device.index):
        torch.get_device_module(device).synchronize()


def default_compute(entries: tuple[str, ...]) -> str:
    """The first accelerator of the spec, else the machine's first one, else the CPU.

    A device type that some library registered at run time computes only where it is named.
    """
    for device in entries:
        if device not in ("cpu", "disk") and "+" not in device:  # stripes lie on donors
            return device
    if (other := supposed()) is not None:
        return next((name for name in other.devices if ":" in name), "cpu")
    accelerator = torch.accelerator.current_accelerator()
    registered = torch._C._get_privateuse1_backend_name()
    if accelerator is not None and accelerator.type != registered and _is_there():
        return f"{accelerator.type}:0"
    return "cpu"


def _is_there() -> bool:
    return torch.accelerator.is_available() and torch.accelerator.device_count() > 0


def needs_values(device: torch.device) -> bool:
    """Whether weights on this device have values. Those of a simulated dry run have none."""
    if device.type == "cpu":
        return True
    is_dry = getattr(torch.get_device_module(device), "is_dry", None)
    return is_dry is None or not is_dry()
