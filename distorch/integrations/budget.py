# SPDX-License-Identifier: Apache-2.0
"""One budget for several modules: the parts of a pipeline.

Note [Who gets the fast places]
A pipeline runs its transformer (or U-Net) at every step, and its decoder and text encoders once. So
the parts are sorted by how often they run, the tiers by how fast they are, and the first bytes go
to the first tier. This common plan says how much of each tier each part gets. Then each part is
planned alone, within these amounts: its weights are spread evenly over the tiers, as in any module,
so that copies overlap with compute.

Tensors are placed whole, so a part may use less of a tier than it was given. The next parts may use
what is left. A weight that found no place in its part's amounts goes to such room, or to the entry
that takes the rest. No device gets more than its entry says.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from distorch.errors import PlacementError, SpecError
from distorch.planner import (
    DeviceInfo,
    Entry,
    Inventory,
    Plan,
    Rest,
    Spec,
    WeightInfo,
    Why,
    can_leave,
    make_plan,
    parse_spec,
    shares_of,
)
from distorch.runtime.options import Options
from distorch.runtime.planning import Wish, plan_inventory, resolve_spec

_BY_USE = (
    ("transformer", "unet"),
    ("prior", "decoder"),
    ("controlnet", "adapter", "motion_adapter"),
    ("vae", "vqvae", "movq", "vqgan", "connectors", "upsampler"),
)  # all others (encoders, checkers) run once, before the first step or after the last


def by_use(names: Iterable[str]) -> list[str]:
    """Parts of a pipeline, the main one first, then those that run often."""

    def turn(name: str) -> int:
        return next((i for i, kind in enumerate(_BY_USE) if name.startswith(kind)), len(_BY_USE))

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
    if options.order == "optimal":
        raise SpecError(
            "order='optimal': a step is one of a single model, and a pipeline has several; give "
            "one part, such as pipe.transformer, to redistribute with order='optimal' and step="
        )
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
    left = {
        device: None if share is None else max(0, share - common.bytes.get(device, 0))
        for device, share in shares.items()
    }
    room, own = _Room(left, dict(common.bytes)), {}
    for name in names:
        own[name] = _plan_of(name, parts[name], common, room, options=options, wish=wish)
    return _joined(common, own, options), own


@dataclass
class _Room:
    """What nobody has yet: bytes `left` of each entry (None: it takes the rest), in the order of
    the entries. `taken`: bytes that all parts together have on a device, those that are not planned
    yet as in the common plan.
    """

    left: dict[str, int | None]
    taken: dict[str, int]

    def spec_for(self, held: Mapping[str, int]) -> str:
        """A placement for a part: its amounts in the common plan (`held`), and what is left."""
        entries, is_slower = [], False
        for device, left in self.left.items():
            if left is None:
                entries.append(f"{device},*")
                is_slower = True
                continue
            # Nothing has to go to a tier that is slower than the one that takes the rest.
            more = 0 if is_slower and not held.get(device) else left
            entries.append(f"{device},{held.get(device, 0) + more}b")
        return ";".join(entries)

    def devices_for(
        self, devices: Mapping[str, DeviceInfo], held: Mapping[str, int]
    ) -> dict[str, DeviceInfo]:
        """The devices with the free memory that the other parts leave to this one."""
        others = {name: self.taken.get(name, 0) - held.get(name, 0) for name in devices}
        return {
            name: replace(device, free_bytes=max(0, device.free_bytes - others[name]))
            for name, device in devices.items()
        }

    def note(self, held: Mapping[str, int], plan: Plan) -> None:
        """Counts what a part's own plan has on each device, instead of the common plan's `held`."""
        for device in held.keys() | plan.bytes.keys():
            more = plan.bytes.get(device, 0) - held.get(device, 0)
            self.taken[device] = self.taken.get(device, 0) + more
            if (left := self.left.get(device)) is not None:
                self.left[device] = left - more


def _renamed(weight: WeightInfo, part: str) -> WeightInfo:
    aliases = tuple(f"{part}.{alias}" for alias in weight.aliases)
    return replace(weight, name=f"{part}.{weight.name}", aliases=aliases)


def _fast_first(spec: Spec, options: Options) -> Spec:
    """The same entries: the compute device, other devices, RAM, disk."""
    _, compute = resolve_spec(spec, None, None, options.compute, {})
    entries = list(spec.entries)
    takes_rest = spec.auto or spec.is_ratio or any(isinstance(e.share, Rest) for e in entries)
    if not takes_rest and "cpu" not in {entry.device for entry in entries}:
        entries.append(Entry("cpu", Rest(), len(entries) + 1, "cpu,*"))  # as a plan would have it

    def slowness(device: str) -> int:
        if device == compute:
            return 0
        return max({"cpu": 2, "disk": 3}.get(part, 1) for part in device.split("+"))

    return replace(spec, entries=tuple(sorted(entries, key=lambda e: slowness(e.device))))


def _plan_of(
    part: str,
    inventory: Inventory,
    common: Plan,
    room: _Room,
    *,
    options: Options,
    wish: Wish,
) -> Plan:
    """One part's plan: on each device the bytes that the common plan has there, spread evenly.

    What it takes of the `room`, or leaves there, is noted.
    """
    placement = {
        name: common.placement[f"{part}.{name}"]
        for weight in inventory.weights
        for name in weight.names
    }
    held: dict[str, int] = {}
    for weight in inventory.weights:
        device = placement[weight.name]
        held[device] = held.get(device, 0) + weight.nbytes
    spec, free = room.spec_for(held), room.devices_for(wish.devices, held)
    chosen: dict[str, Any] = {
        "min_bytes": common.options["min_bytes"],
        "keep": _inside(part, inventory, options.keep),
        "offload": _inside(part, inventory, options.offload),
        "rules": [
            [inside, device]
            for pattern, device in options.rules
            for inside in _inside(part, inventory, (pattern,))
        ],
    }
    leaves = can_leave(inventory, chosen["min_bytes"], chosen["keep"])
    plan = Plan.build(
        inventory, placement, compute=wish.compute, spec=spec, order="sequential", budget=None,
        floor=sum(w.nbytes for w in inventory.weights if w.name not in leaves), options=chosen,
        why={w.name: Why(common.why[f"{part}.{w.name}"]) for w in inventory.weights},
    )  # fmt: skip
    if options.order != "sequential":
        with suppress(PlacementError):  # spread evenly, it may not fit to the byte
            plan = make_plan(inventory, spec, compute=wish.compute, devices=free, **chosen)
    room.note(held, plan)
    # The pipeline's report looks after the budget, which is of all parts.
    return replace(plan, budget=None)


def _inside(part: str, inventory: Inventory, patterns: Iterable[str]) -> list[str]:
    """Patterns for names in a pipeline, as patterns for names in one of its parts.

    "vae.*" is "*" in the VAE. A pattern that does not begin with the part's name and a dot is
    replaced by the names that it matches there.
    """
    names = [name for weight in inventory.weights for name in weight.names]
    found = []
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(f"{part}.{name}", pattern)]
        inside = pattern.removeprefix(f"{part}.")
        if inside != pattern:
            found += [inside] * bool(matched)
        else:
            found += [glob.escape(name) for name in matched]
    return found


def _joined(common: Plan, own: Mapping[str, Plan], options: Options) -> Plan:
    """The common plan with the places that the parts' plans have."""
    placement = {
        f"{part}.{name}": device
        for part, plan in own.items()
        for name, device in plan.placement.items()
    }
    return replace(common, placement=placement, order=options.order)
