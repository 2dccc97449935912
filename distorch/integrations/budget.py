"""One budget for several modules: the parts of a pipeline.

Note [Who gets the fast places]
A pipeline runs its transformer (or U-Net) at every step, its decoder and its text encoders once. So
the parts are put in this order, the tiers in the order of their speed, and the first bytes go to
the first tier. That says how much of each tier each part gets. Within a part, what stays and what
leaves is then spread evenly, as in a module alone: its copies overlap with its compute.

Bytes are whole tensors, so a part that is spread evenly may leave some of its share over. That is
room for the parts after it, and what found no place goes where there is such room, or to the entry
that takes the rest. No device ever gets more than its entry says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from distorch.errors import PlacementError
from distorch.planner import (
    DeviceInfo,
    Inventory,
    Plan,
    Spec,
    WeightInfo,
    make_plan,
    parse_spec,
    shares_of,
)
from distorch.runtime.distribution import Wish, plan_inventory, resolve_spec
from distorch.runtime.options import Options

_AT_EVERY_STEP = ("transformer", "unet", "controlnet", "prior", "decoder", "adapter", "motion")
_AT_THE_END = ("vae", "vqvae", "movq", "vqgan", "connectors", "upsampler")


def by_use(names: Iterable[str]) -> list[str]:
    """Parts of a pipeline, those that run most often first."""

    def turn(name: str) -> int:
        kinds = (_AT_EVERY_STEP, _AT_THE_END)
        return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds))

    return sorted(names, key=turn)


def plan_together(
    parts: Mapping[str, Inventory],
    spec: str | None,
    options: Options,
    devices: dict[str, DeviceInfo],
    *,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
) -> tuple[Plan, dict[str, Plan]]:
    """The plan of all parts together, with names as "transformer.blocks.0.weight"; and the plan of
    each. Raises SpecError, PlacementError.
    """
    names = by_use(parts)
    weights = (_renamed(weight, name) for name in names for weight in parts[name].weights)
    whole = Inventory(tuple(weights))
    parsed = None if spec is None else _fast_first(parse_spec(spec), options)
    common = plan_inventory(
        whole, parsed, replace(options, order="sequential"), devices,
        virtual_vram=virtual_vram, donor=donor,
    )  # fmt: skip
    wish = Wish.of(parsed, options.compute, devices, virtual_vram, donor)
    shares = shares_of(whole, wish.spec, **wish.arguments())
    room = {
        device: None if share is None else max(0, share - common.bytes.get(device, 0))
        for device, share in shares.items()
    }
    own = {}
    for name in names:
        own[name] = _plan_of(name, parts[name], common, room, options=options, wish=wish)
    return _joined(common, own, options), own


def _renamed(weight: WeightInfo, part: str) -> WeightInfo:
    aliases = tuple(f"{part}.{alias}" for alias in weight.aliases)
    return replace(weight, name=f"{part}.{weight.name}", aliases=aliases)


def _fast_first(spec: Spec, options: Options) -> Spec:
    """The same entries: the compute device, other devices, RAM, disk."""
    _, compute = resolve_spec(spec, None, None, options.compute, {})

    def slowness(device: str) -> int:
        if device == compute:
            return 0
        return max({"cpu": 2, "disk": 3}.get(part, 1) for part in device.split("+"))

    return replace(spec, entries=tuple(sorted(spec.entries, key=lambda e: slowness(e.device))))


def _plan_of(
    part: str,
    inventory: Inventory,
    common: Plan,
    room: dict[str, int | None],
    *,
    options: Options,
    wish: Wish,
) -> Plan:
    """One part's plan: on each device the bytes that the common plan has there, spread evenly.

    `room` is what nobody has yet, and is changed.
    """
    placement = {
        weight_name: common.placement[f"{part}.{weight_name}"]
        for weight in inventory.weights
        for weight_name in weight.names
    }
    held = dict.fromkeys(room, 0)
    for weight in inventory.weights:
        device = placement[weight.name]
        held[device] = held.get(device, 0) + weight.nbytes
    spec = ";".join(
        f"{device},*" if left is None else f"{device},{held[device] + left}b"
        for device, left in room.items()
    )
    choices: dict[str, Any] = {
        "min_bytes": common.options["min_bytes"],
        "keep": _patterns_for(part, inventory, options.keep),
        "offload": _patterns_for(part, inventory, options.offload),
        "rules": [
            [inside, device]
            for pattern, device in options.rules
            for inside in _patterns_for(part, inventory, (pattern,))
        ],
    }
    plan = make_plan(
        inventory, f"{wish.compute},*", compute=wish.compute, devices=_roomy(wish.devices),
        min_bytes=choices["min_bytes"], keep=choices["keep"],
    )  # fmt: skip
    plan = replace(plan, placement=placement, spec=spec, order="sequential", options=choices)
    if options.order != "sequential":
        with suppress(PlacementError):  # spread evenly, it may not fit to the byte
            plan = make_plan(
                inventory, spec, compute=wish.compute, devices=_roomy(wish.devices), **choices
            )
    for device, left in room.items():
        if left is not None:
            room[device] = held[device] + left - plan.bytes.get(device, 0)
    # The pipeline's report looks after the budget, which is of all parts.
    return replace(plan, budget=None)


def _roomy(devices: Mapping[str, DeviceInfo]) -> dict[str, DeviceInfo]:
    """The common plan has found that all parts fit: one of them does."""
    return {
        name: replace(device, free_bytes=device.total_bytes) for name, device in devices.items()
    }


def _patterns_for(part: str, inventory: Inventory, patterns: Iterable[str]) -> list[str]:
    """The patterns that match something of this part, as they read from inside it."""
    names = [name for weight in inventory.weights for name in weight.names]
    found = []
    for pattern in patterns:
        inside = pattern.removeprefix(f"{part}.")
        if any(fnmatchcase(f"{part}.{n}", pattern) and fnmatchcase(n, inside) for n in names):
            found.append(inside)
    return found


def _joined(common: Plan, own: Mapping[str, Plan], options: Options) -> Plan:
    """The common plan with the places that the parts' plans have."""
    placement = {
        f"{part}.{name}": device
        for part, plan in own.items()
        for name, device in plan.placement.items()
    }
    return replace(common, placement=placement, order=options.order)
