# SPDX-License-Identifier: Apache-2.0
"""Specs to choose from, made from this machine: titles, such as "FLUX.1 ... on cuda:0 (8 GB)".

They are for the device on which the host computes. What it keeps comes to RAM when another model
needs the device, and so does what other accelerators keep. So RAM has to have room for that, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distorch.comfy import host
from distorch.comfy.placement import spec_problem
from distorch.planner import DeviceInfo
from distorch.runtime.ring_room import AUTO_RING_BYTES

_SPEC_GB, _FILE_GB = 1 << 30, 10**9
# Of the memory. The rest is for whatever else runs there.
_SHARE_OF_RAM, _SHARE_OF_DEVICE = 0.75, 0.9


@dataclass(frozen=True)
class Family:
    """A published model: what it makes, how the host calls its kind, and the shape of its latent.

    `gb` is the size of its file and `largest` that of its largest weight, in 10^9 bytes, with 16
    bits for each number. Workflows have `count` such files.
    """

    title: str
    kind: str
    latent: Sequence[int]
    gb: float
    largest: float
    config: Mapping[str, Any] = field(default_factory=dict)
    count: int = 1


FAMILIES = (
    Family("FLUX.1, 1024x1024", "Flux", (1, 16, 128, 128), 23.8, 0.132),
    Family("FLUX.2, 1024x1024", "Flux2", (1, 128, 64, 64), 64.4, 0.679, {"hidden_size": 6144}),
    Family("Qwen-Image, 1328x1328", "QwenImage", (1, 16, 1, 166, 166), 40.9, 0.113),
    Family("SDXL, 1024x1024", "SDXL", (1, 4, 128, 128), 5.1, 0.026),
    Family("Wan 2.2 14B, 832x480, 81 frames", "WAN21_T2V", (1, 16, 21, 60, 104), 28.6, 0.142,
           {"dim": 5120}, 2),
)  # fmt: skip


def general() -> dict[str, str]:
    """Title -> spec, for whatever has weights."""
    device, ram = host.default_device(), host.devices()["cpu"]
    found = {"Automatic, as much as ComfyUI's free memory allows": "auto"}
    if device == "cpu":
        part = _down(int(_SHARE_OF_RAM * ram.total_bytes))
        return _valid(found | {f"{part} in RAM, the rest on disk": f"cpu,{part};disk,*"})
    return _valid(found | {
        f"Half on {device}, half in RAM": f"{device},50%;cpu,50%",
        f"Nothing on {device}, all in RAM": f"{device},0b;cpu,*",
        f"Nothing on {device}, all on disk": f"{device},0b;disk,*",
    })  # fmt: skip


def for_models() -> dict[str, str]:
    """Title -> spec, for those of `FAMILIES` for whose sampling the device has room, as the host
    says.
    """
    devices, device = host.devices(), host.default_device()
    found: dict[str, str] = {}
    for family in FAMILIES if device != "cpu" else ():
        needed = host.sampling_memory(family.kind, family.config, family.latent)
        if needed is None:
            continue
        ring = max(AUTO_RING_BYTES, int(2 * family.largest * _FILE_GB))
        room = int(_SHARE_OF_DEVICE * devices[device].total_bytes) - needed - ring
        if room >= 0:
            found |= _for_family(family, device, room, devices)
    return _valid(found)


def _valid(found: Mapping[str, str]) -> dict[str, str]:
    """Without those that this machine has no device for, such as a disk."""
    devices = host.devices()
    return {title: spec for title, spec in found.items() if spec_problem(spec, devices) is None}


def _for_family(
    family: Family, device: str, room: int, devices: Mapping[str, DeviceInfo]
) -> dict[str, str]:
    """With this device, which has so much room for weights, and with all."""
    title = f"{family.title}, on {device} ({devices[device].total_bytes / _SPEC_GB:.0f} GB)"
    others = {
        name: int(_SHARE_OF_DEVICE * info.total_bytes)
        for name, info in devices.items()
        if name not in (device, "cpu", "disk")
    }
    found = {title: _spec(family, {device: room}, devices)}
    if others:
        spec = _spec(family, {device: room, **others}, devices)
        found[f"{title} and {', '.join(others)}"] = spec
    return found


def _spec(family: Family, room: Mapping[str, int], devices: Mapping[str, DeviceInfo]) -> str:
    """As much on each of these as there is room for and as RAM can take over, then RAM and disk."""
    left = int(_SHARE_OF_RAM * devices["cpu"].total_bytes / family.count)
    if family.gb * _FILE_GB <= left:
        entries = [f"{name},{_down(nbytes)}" for name, nbytes in room.items()]
        return ";".join([*entries, "cpu,*"])
    entries = []
    for name, nbytes in room.items():
        share = min(nbytes, left)
        left -= share
        entries.append(f"{name},{_down(share)}")
    return ";".join([*entries, f"cpu,{_down(left)}", "disk,*"])


def _down(nbytes: int) -> str:
    """In GB (2^30) as specs have them, rounded down: "5.3gb"."""
    tenths = int(10 * nbytes / _SPEC_GB)
    return f"{tenths / 10:g}gb" if tenths else "0b"
