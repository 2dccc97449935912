# SPDX-License-Identifier: Apache-2.0
"""From what was asked for to a plan, with what this machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distorch.errors import PlacementError
from distorch.machine import machine
from distorch.machine.supposed import supposed
from distorch.planner import (
    Arrange,
    DeviceInfo,
    Inventory,
    Plan,
    Spec,
    make_plan,
    parse_bytes,
    parse_spec,
    shares_of,
    virtual_vram_spec,
)
from distorch.runtime.groups import Group, size_of, unique_buffers
from distorch.runtime.options import Options, compute_device
from distorch.runtime.staging import current_place

_RESERVE_SHARE = 0.2  # of free memory that "auto" leaves for activations


def resolve_spec(
    spec: str | Spec | None,
    virtual_vram: str | int | None,
    donor: str | None,
    compute: str | torch.device | None,
    devices: dict[str, DeviceInfo],
) -> tuple[Spec, str]:
    """The parsed spec and the compute device that it means."""
    if compute is not None:
        compute = compute_device(compute)
    if spec is not None:
        parsed = spec if isinstance(spec, Spec) else parse_spec(spec)
        entries = tuple(entry.device for entry in parsed.entries)
        return parsed, compute or machine.default_compute(entries)
    target = compute or machine.default_compute(())
    assert virtual_vram is not None
    if donor is None:
        donor = "disk" if target == "cpu" else "cpu"
    return virtual_vram_spec(virtual_vram, donor, target, devices), target


def devices_for(groups: Iterable[Group], module: nn.Module | None) -> dict[str, DeviceInfo]:
    """The machine's devices; memory that the module holds now counts as free for it."""
    found = machine.devices()
    if supposed() is not None:  # the module holds nothing there
        return found
    held: dict[str, int] = {}
    for group in groups:
        if not group.first.is_meta:
            place = current_place(group.first)
            held[place] = held.get(place, 0) + group.nbytes
    for buffer in unique_buffers(module) if module is not None else ():
        place = current_place(buffer.tensor)
        held[place] = held.get(place, 0) + size_of(buffer.tensor)
    for place, nbytes in held.items():
        if place in found:
            device = found[place]
            found[place] = dataclasses.replace(
                device, free_bytes=min(device.total_bytes, device.free_bytes + nbytes)
            )
    return found


@dataclass(frozen=True)
class Wish:
    """What was asked for, against this machine: arguments of `make_plan` and `shares_of`."""

    spec: Spec
    compute: str
    devices: dict[str, DeviceInfo]
    reserve_bytes: int

    @classmethod
    def of(
        cls,
        spec: str | Spec | None,
        compute: str | torch.device | None,
        devices: dict[str, DeviceInfo],
        virtual_vram: str | int | None = None,
        donor: str | None = None,
    ) -> Wish:
        """Raises SpecError, PlacementError."""
        parsed, target = resolve_spec(spec, virtual_vram, donor, compute, devices)
        named = {place for entry in parsed.entries for place in entry.device.split("+")}
        devices = machine.with_exact(devices, {target, *named})
        reserve = int(devices[target].free_bytes * _RESERVE_SHARE) if target in devices else 0
        return cls(parsed, target, devices, reserve)

    def check(self) -> None:
        """Raises PlacementError on a device that is not there or does not hold its share."""
        shares_of(Inventory(()), self.spec, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """By name, but for the spec."""
        return {
            "compute": self.compute, "devices": self.devices, "reserve_bytes": self.reserve_bytes,
        }  # fmt: skip


def plan_inventory(
    inventory: Inventory,
    spec: str | Spec | None,
    options: Options,
    devices: dict[str, DeviceInfo],
    *,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    arrange: Arrange | None = None,
) -> Plan:
    """A plan for weights that are known by name and size.

    `arrange` is from `distorch.rehearsal.arrangement`, which finds the optimal order.
    """
    wish = Wish.of(spec, options.compute, devices, virtual_vram, donor)
    return make_plan(
        inventory,
        wish.spec,
        **wish.arguments(),
        order=options.order,
        min_bytes=options.min_bytes,
        keep=options.keep,
        offload=options.offload,
        rules=options.rules,
        give_away=None if virtual_vram is None else parse_bytes(virtual_vram),
        arrange=arrange,
    )


def check_plan_fits(plan: Plan, inventory: Inventory) -> None:
    """A plan that is given must be about these weights and this machine. PlacementError."""
    compute_device(plan.compute, "the plan's compute")
    there = machine.devices()
    if absent := [d for place in plan.bytes for d in place.split("+") if d not in there]:
        raise PlacementError(
            f"the plan uses {absent[0]!r}; this machine has {', '.join(sorted(there))}; make a "
            "new one with distorch.plan"
        )
    for weight in inventory.weights:
        if weight.name not in plan.placement:
            raise PlacementError(
                f"the plan has no place for {weight.name!r}; make a new one with distorch.plan"
            )
        size = plan.sizes.get(weight.name)
        if size is not None and size != weight.nbytes:
            raise PlacementError(
                f"the plan was made for {weight.name!r} with {size} bytes, it has {weight.nbytes}; "
                "make a new one with distorch.plan"
            )
    known = {name for weight in inventory.weights for name in weight.names}
    if extra := [name for name in plan.placement if name not in known]:
        raise PlacementError(
            f"the plan places {extra[0]!r}, which the model does not have; make a new one with "
            "distorch.plan"
        )
