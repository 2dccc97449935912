# SPDX-License-Identifier: Apache-2.0
"""What a node was asked for: the old inputs and our own, as one placement string.

Pure: no host, no torch. The old pack's strings keep their meaning where they had one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distorch.errors import PlacementError, SpecError
from distorch.planner import DeviceInfo, Spec, parse_spec, virtual_vram_spec

SMALL_SHARE = 1e-4  # tensors below this share of the model stay on the compute device
SMALL_MOST = 1 << 20  # bytes

_ENTRY = re.compile(
    r"([^,;]+),(?:[0-9.]*[a-z%]*(?=\*))?([0-9.]+|\*)([a-z]*|%)\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Placement:
    """Where a model's weights should be.

    `spec` a placement string; `compute` the device that runs the model; `lora_precision`
    "as stored" (patched weights keep their dtype) or "full" (weights of 8 bits get 16 when they are
    patched); other fields are options of `distorch.distribute`.
    """

    spec: str
    compute: str
    order: str = "interleaved"
    prefetch: str = "auto"
    lora_precision: str = "as stored"

    def options(self, model_bytes: int) -> dict[str, Any]:
        """Keyword arguments for `distorch.distribute`."""
        small = min(SMALL_MOST, int(model_bytes * SMALL_SHARE))
        return {
            "compute": self.compute,
            "order": self.order,
            "prefetch": self.prefetch,
            "min_bytes": small,
        }

    def on(self, device: str) -> Placement:
        """The same, computing on another device. PlacementError if that is a donor."""
        if device == self.compute:
            return self
        entries = parse_spec(self.spec).entries
        if any(device in entry.device.split("+") for entry in entries):
            raise PlacementError(
                f"a copy of this model should compute on {device!r}, which placement "
                f"{self.spec!r} uses as a donor; take it out of one of the two"
            )
        moved = (
            entry.text.replace(self.compute, device, 1)
            if entry.device == self.compute
            else entry.text
            for entry in entries
        )
        return replace(self, spec=";".join(moved) or self.spec, compute=device)


def expert_spec(text: str, compute: str | None = None) -> str:
    """The old "expert mode allocations" as a placement string of ours. SpecError.

    The rules of old: what has no comma is skipped; a device that is named twice has what was said
    last; one with "*" takes the rest, whatever number stands beside it ("cpu,5gb*"). With bytes in
    the string every bare number is bytes; with a percentage every one is a part of a ratio, so
    that "cpu,50%" alone is all of it. Bare numbers alone are shares of the devices' memory, and
    what they leave stays on `compute`.
    """
    parts = ["".join(part.split()) for part in text.split(";") if "," in part]
    entries = [found for part in parts if (found := _ENTRY.match(part))]
    if not entries or len(entries) < len(parts):
        return parse_spec(text).text  # of ours, or an error that says where it is
    said: dict[str, tuple[str, str]] = {}
    for device, number, unit in (entry.groups() for entry in entries):
        if said.get(device, ("", ""))[0] != "*":
            said[device] = (number, unit.lower())
    rest = [device for device, (number, _) in said.items() if number == "*"]
    for device in rest[:-1]:
        del said[device]
    units = {unit for number, unit in said.values() if number != "*"}
    in_bytes, in_percent = bool(units - {"", "%"}), "%" in units
    if in_percent and not in_bytes and len(said) == 1:
        return parse_spec(f"{next(iter(said))},*").text
    if units == {""} and not rest and compute is not None:
        said = {compute: ("*", ""), **{d: s for d, s in said.items() if d != compute}}
    default = "b" if in_bytes else "%" if in_percent else ""
    return parse_spec(
        ";".join(f"{d},{n}{'' if n == '*' else u or default}" for d, (n, u) in said.items())
    ).text


def donors_for(donor: str, compute: str, others: Sequence[str] = ()) -> str:
    """Donors in order, without the compute device: "cuda:1,cpu"; "" when none is left."""
    names = [*others, *(part.strip() for part in donor.split(","))]
    return ",".join(dict.fromkeys(name for name in names if name and name != compute))


def old_placement(
    compute: str,
    virtual_vram_gb: float,
    donor: str,
    expert: str,
    devices: Mapping[str, DeviceInfo],
    *,
    other_vram: bool = False,
) -> Placement | None:
    """The placement that the old inputs mean; None when nothing is to leave the compute device.

    As of old, an expert string wins over virtual VRAM. Raises SpecError, PlacementError.
    """
    if expert.strip():
        return Placement(expert_spec(expert, compute), compute)
    others = [name for name in devices if name not in ("cpu", "disk")] if other_vram else []
    donors = donors_for(donor, compute, others)
    if virtual_vram_gb <= 0 or not donors:
        return None
    spec = virtual_vram_spec(int(virtual_vram_gb * (1 << 30)), donors, compute, devices)
    return Placement(spec.text, compute)


def spec_problem(text: str, devices: Mapping[str, DeviceInfo], *, old: bool = False) -> str | None:
    """What is wrong with a placement string on this machine, in words; None if nothing is."""
    if old and not text.strip():
        return None
    try:
        spec: Spec = parse_spec(expert_spec(text) if old else text)
    except SpecError as error:
        return str(error)
    for entry in spec.entries:
        for device in entry.device.split("+"):
            if device not in devices:
                known = ", ".join(sorted(devices))
                return (
                    f"placement {text!r}, entry {entry.position} ({entry.text!r}): there is no "
                    f"{device!r} here; this machine has {known}"
                )
    return None
