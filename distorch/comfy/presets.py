# SPDX-License-Identifier: Apache-2.0
"""Specs to choose from, made from this machine: titles, such as "FLUX.1 ... on cuda:0 (8 GB)"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distorch.comfy import host
from distorch.planner import DeviceInfo
from distorch.runtime.ring_room import AUTO_RING_BYTES

_SPEC_GB, _FILE_GB = 1 << 30, 10**9
# Of RAM and of GPUs that only keep weights. The rest is for whatever else runs there.
_SHARE_OF_RAM, _SHARE_OF_DONOR = 0.75, 0.9


@dataclass(frozen=True)
class Family:
    """A published model: what it makes, how the host calls its kind, and the shape of its latent.

    `gb` is the size of its file and `largest` that of its largest weight, in 10^9 bytes, with 16
    bits for each number.
    """

    title: str
    kind: str
    latent: Sequence[int]
    gb: float
    largest: float
    config: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = (
    Family("FLUX.1, 1024x1024", "Flux", (1, 16, 128, 128), 23.8, 0.132),
    Family("FLUX.2, 1024x1024", "Flux2", (1, 128, 64, 64), 64.4, 0.679, {"hidden_size": 6144}),
    Family("Qwen-Image, 1328x1328", "QwenImage", (1, 16, 1, 166, 166), 40.9, 0.113),
    Family("SDXL, 1024x1024", "SDXL", (1, 4, 128, 128), 5.1, 0.026),
    Family("Wan 2.2 14B, 832x480, 81 frames", "WAN21_T2V", (1, 16, 21, 60, 104), 28.6, 0.142,
           {"dim": 5120}),
)  # fmt: skip


def general() -> dict[str, str]:
    """Title -> spec, for whatever has weights."""
    devices, first = host.devices(), host.first_choice()
    found = {"Automatic, as much as ComfyUI's free memory allows": "auto"}
    if first == "cpu":
        return found | {f"{_gb(devices['cpu'])} of RAM, then disk": f"{_ram(devices)};disk,*"}
    return found | {
        f"Half on {first}, half in RAM": f"{first},50%;cpu,50%",
        f"Nothing on {first}, all in RAM": f"{first},0b;cpu,*",
        f"Nothing on {first}, all on disk": f"{first},0b;disk,*",
    }


def for_models() -> dict[str, str]:
    """Title -> spec, for models of `FAMILIES` whose need of memory the host knows, on each
    accelerator.
    """
    devices = host.devices()
    accelerators = [name for name in host.computing_devices() if name != "cpu"]
    found: dict[str, str] = {}
    for family in FAMILIES:
        needed = host.sampling_memory(family.kind, family.config, family.latent)
        if needed is None:
            continue
        for device in accelerators:
            found |= _for_family(family, device, needed + _ring(family), devices)
    return found


def _ring(family: Family) -> int:
    return max(AUTO_RING_BYTES, int(2 * family.largest * _FILE_GB))


def _for_family(
    family: Family, device: str, other: int, devices: Mapping[str, DeviceInfo]
) -> dict[str, str]:
    """With one device and with all; `other` is what it needs beside the weights, in bytes."""
    room = max(0, devices[device].total_bytes - other)
    own = f"{device},{_down(room)}"
    title = f"{family.title}, on {device} ({_gb(devices[device])})"
    donors = {
        name: int(_SHARE_OF_DONOR * info.total_bytes)
        for name, info in devices.items()
        if name not in (device, "cpu", "disk")
    }
    found = {title: f"{own};{_rest(family, room, devices)}"}
    if donors:
        entries = ";".join(f"{name},{_down(nbytes)}" for name, nbytes in donors.items())
        rest = _rest(family, room + sum(donors.values()), devices)
        found[f"{title} and {', '.join(donors)}"] = f"{own};{entries};{rest}"
    return found


def _rest(family: Family, held: int, devices: Mapping[str, DeviceInfo]) -> str:
    """To RAM, and to the disk what RAM may not have room for."""
    enough = family.gb * _FILE_GB - held <= _SHARE_OF_RAM * devices["cpu"].total_bytes
    return "cpu,*" if enough or "disk" not in devices else f"{_ram(devices)};disk,*"


def _ram(devices: Mapping[str, DeviceInfo]) -> str:
    return f"cpu,{_down(int(_SHARE_OF_RAM * devices['cpu'].total_bytes))}"


def _down(nbytes: int) -> str:
    """In GB (2^30) as specs have them, rounded down: "5.3gb"."""
    tenths = int(10 * nbytes / _SPEC_GB)
    return f"{tenths / 10:g}gb" if tenths else "0b"


def _gb(info: DeviceInfo) -> str:
    """As cards are sold."""
    return f"{info.total_bytes / _SPEC_GB:.0f} GB"
