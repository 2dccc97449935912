# SPDX-License-Identifier: Apache-2.0
"""Spec + inventory + device memory -> plan. Deterministic, exact in bytes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase

from distorch.display.tables import human_bytes
from distorch.errors import PlacementError, SpecError
from distorch.planner.inventory import DeviceInfo, DevicesElsewhere, Inventory, WeightInfo
from distorch.planner.plan import Plan
from distorch.planner.spec import (
    Bytes,
    Entry,
    Fraction,
    Percent,
    Rest,
    Spec,
    parse_bytes,
    parse_spec,
)
from distorch.planner.why import Why

# Fetches of smaller weights cost more than their bytes are worth.
MIN_BYTES = 1 << 20
ORDERS = ("interleaved", "sequential", "optimal")


@dataclass
class _Bin:
    """One entry being filled. `budget` in bytes; None takes the rest."""

    device: str
    budget: int | None
    entry: Entry | None
    used: int = 0

    def room(self) -> float:
        return float("inf") if self.budget is None else self.budget - self.used

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.room()


@dataclass
class _Sorted:
    """The weights by what decides about them."""

    fixed: list[WeightInfo] = field(default_factory=list)
    ruled: list[tuple[WeightInfo, str]] = field(default_factory=list)
    offloaded: list[WeightInfo] = field(default_factory=list)
    free: list[WeightInfo] = field(default_factory=list)
    why: dict[str, Why] = field(default_factory=dict)  # for all of them


@dataclass(frozen=True)
class Freedom:
    """What may still be decided when all that must lie somewhere does.

    Attributes:
        free: Weights that may lie on the compute device or on a donor.
        leaving: Weights that may lie on any donor.
        ruled: Weights that a rule has sent to a donor -> that donor. Nothing may be decided there.
        rooms: Device -> bytes that `free` and `leaving` may have there, the compute device first.
        placement: Name -> device for `free` and `leaving`, as it is if nothing is decided.
    """

    free: tuple[WeightInfo, ...]
    leaving: tuple[WeightInfo, ...]
    ruled: tuple[tuple[WeightInfo, str], ...]
    rooms: Mapping[str, int]
    placement: Mapping[str, str]

    @property
    def weights(self) -> tuple[WeightInfo, ...]:
        """All three kinds, in this order."""
        return (*self.free, *self.leaving, *(weight for weight, _ in self.ruled))

    @classmethod
    def within(cls, plan: Plan, inventory: Inventory) -> Freedom:
        """What could be decided otherwise with the bytes that a plan has on each device."""
        options = plan.options
        movable = can_leave(inventory, options.get("min_bytes", 0), options.get("keep", ()))
        free = tuple(weight for weight in inventory.weights if weight.name in movable)
        placement = {weight.name: plan.placement[weight.name] for weight in free}
        rooms = {plan.compute: 0}
        for weight in free:
            device = placement[weight.name]
            rooms[device] = rooms.get(device, 0) + weight.nbytes
        return cls(free, (), (), rooms, placement)


# The plan with these devices for `free` and `leaving`, by name.
PlanFor = Callable[[Mapping[str, str]], Plan]
# Decides on a device for each of `free` and `leaving`, by name.
Arrange = Callable[[Freedom, PlanFor], Mapping[str, str]]


def make_plan(
    inventory: Inventory,
    spec: Spec | str,
    *,
    compute: str,
    devices: Mapping[str, DeviceInfo],
    order: str = "interleaved",
    min_bytes: int | str = MIN_BYTES,
    keep: Sequence[str] = (),
    offload: Sequence[str] = (),
    rules: Sequence[tuple[str, str]] = (),
    reserve_bytes: int = 0,
    give_away: int | None = None,
    arrange: Arrange | None = None,
) -> Plan:
    """Decides for every weight where it lives. All sizes in bytes.

    Entries are served in the order given; a device never gets more than its share, and less by
    less than the next tensor. Weights that cannot move (buffers, 1-D, small, kept) stay on
    `compute` and are counted first there; where they alone are more than its share,
    `Plan.over_budget` says so. `min_bytes="auto"` is `MIN_BYTES`, or less where the share asks for
    it. `reserve_bytes` is left free by a spec that is "auto". `give_away`: bytes that are not to
    stay on `compute`, where the spec has it take the rest. `arrange` decides what else would be
    spread evenly, within the same shares. Raises SpecError, PlacementError.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    parsed = _auto_spec(inventory, compute, devices, reserve_bytes) if parsed.auto else parsed
    _check_devices(parsed, compute, devices)
    bins = _make_bins(parsed, inventory.total_bytes, compute, devices)
    # A share of 0 asks for no more than the usual: what is small stays, whatever it is in all.
    budget = next((b.budget for b in bins if b.device == compute), None) or None
    if give_away is not None:
        budget = max(0, inventory.total_bytes - give_away)
    least = MIN_BYTES if min_bytes == "auto" else int(min_bytes)
    sorted_ = _sort(inventory, least, keep, offload, rules)
    if min_bytes == "auto":
        least = _lowered(sorted_, budget, keep, compute)
        sorted_ = _sort(inventory, least, keep, offload, rules)
    floor = sum(weight.nbytes for weight in sorted_.fixed)
    for filled in bins:
        if filled.device == compute and filled.budget is not None:
            filled.budget = max(0, filled.budget - floor)
    placement = {weight.name: compute for weight in sorted_.fixed}
    placement |= _place_ruled(sorted_, bins, compute)
    donors = [b for b in bins if b.device != compute]
    rooms = {compute: 0} | {b.device: b.room() for b in bins}
    # What must leave goes to donors first: it has nowhere else to go.
    spread = _fill(sorted_.offloaded, donors, order, parsed)
    spread |= _fill(sorted_.free, bins, order, parsed)

    def plan_for(places: Mapping[str, str]) -> Plan:
        plan = Plan.build(
            inventory,
            {**placement, **places},
            compute=compute,
            spec="auto" if not isinstance(spec, str) and spec.auto else parsed.text,
            order=order,
            floor=floor,
            # What is given away is whole tensors: less than one more may stay than was asked for.
            budget=budget if give_away is None or floor > (budget or 0) else None,
            options={"min_bytes": least, "keep": list(keep), "offload": list(offload),
                     "rules": [list(rule) for rule in rules]},
            why=sorted_.why,
        )  # fmt: skip
        _check_capacity(plan, devices, inventory)
        return plan

    plan = plan_for(spread)
    if arrange is None or not spread:
        return plan
    known = _known_rooms(rooms, sorted_, spread, compute=compute, devices=devices)
    ruled = tuple((weight, device) for weight, device in sorted_.ruled if device != compute)
    freedom = Freedom(tuple(sorted_.free), tuple(sorted_.offloaded), ruled, known, spread)
    return plan_for(arrange(freedom, plan_for))


def _known_rooms(
    rooms: Mapping[str, float],
    sorted_: _Sorted,
    spread: Mapping[str, str],
    *,
    compute: str,
    devices: Mapping[str, DeviceInfo],
) -> dict[str, int]:
    """Bytes for each device, also for the one that takes the rest.

    On the compute device this is what an even spread leaves there: donors are to be filled. On a
    donor it is what is free.
    """
    found = {}
    for device, room in rooms.items():
        used = sum(
            weight.nbytes
            for weight in (*sorted_.free, *sorted_.offloaded)
            if spread[weight.name] == device
        )
        if device == compute and room == float("inf"):
            found[device] = used
            continue
        there = [weight for weight, place in sorted_.ruled if place == device]
        there += sorted_.fixed if device == compute else []
        free = _joined(device, devices).free_bytes - sum(weight.nbytes for weight in there)
        found[device] = max(used, int(min(room, free)))
    return found


def shares_of(
    inventory: Inventory,
    spec: Spec | str,
    *,
    compute: str,
    devices: Mapping[str, DeviceInfo],
    reserve_bytes: int = 0,
) -> dict[str, int | None]:
    """Device -> bytes that `make_plan` lets it have, in the order of the entries; None: the rest.

    Raises SpecError, PlacementError.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    parsed = _auto_spec(inventory, compute, devices, reserve_bytes) if parsed.auto else parsed
    _check_devices(parsed, compute, devices)
    bins = _make_bins(parsed, inventory.total_bytes, compute, devices)
    return {filled.device: filled.budget for filled in bins}


def virtual_vram_spec(
    virtual_vram: str | int, donor: str, compute: str, devices: Mapping[str, DeviceInfo]
) -> Spec:
    """The spec that gives so many bytes away: donors filled in the order given, the last takes
    what is left, the compute device keeps the rest. Raises SpecError, PlacementError.
    """
    left = parse_bytes(virtual_vram)
    if not isinstance(donor, str):
        raise SpecError(f"donor={donor!r}: expected one or more devices, such as 'cuda:1,cpu'")
    names = [name for name in (part.strip() for part in donor.split(",")) if name]
    if not names:
        raise SpecError(f"donor={donor!r}: expected one or more devices, such as 'cuda:1,cpu'")
    parts = [f"{compute},*"]
    for position, name in enumerate(names):
        device = parse_spec(f"{name},*").entries[0].device
        if device == compute:
            raise SpecError(f"donor={donor!r}: {device!r} is the compute device itself")
        free = devices[device].free_bytes if device in devices else left
        take = left if position == len(names) - 1 else min(left, free)
        parts.append(f"{device},{take}b")
        left -= take
    return parse_spec(";".join(parts))


def _auto_spec(
    inventory: Inventory, compute: str, devices: Mapping[str, DeviceInfo], reserve_bytes: int
) -> Spec:
    """As much as free memory allows on the compute device, then RAM, then disk."""
    if compute not in devices:
        raise PlacementError(_missing(compute, devices))
    room = max(0, devices[compute].free_bytes - reserve_bytes)
    if inventory.total_bytes <= room:
        return parse_spec(f"{compute},*")
    if compute == "cpu" or "cpu" not in devices:
        return parse_spec(f"{compute},{room}b;disk,*")
    left = inventory.total_bytes - room
    host = devices["cpu"].free_bytes
    if left <= host or "disk" not in devices:
        return parse_spec(f"{compute},{room}b;cpu,*")
    return parse_spec(f"{compute},{room}b;cpu,{host}b;disk,*")


def _missing(device: str, devices: Mapping[str, DeviceInfo]) -> str:
    if isinstance(devices, DevicesElsewhere):
        return (
            f"device {device!r} is not there; the machine {devices.machine!r} has "
            f"{', '.join(sorted(devices))}. Give another machine=, or place on these"
        )
    hint = ""
    if device == "disk":
        folder = os.environ.get("DISTORCH_DISK", "not set")
        hint = f"; make the folder for donor files (DISTORCH_DISK in the environment: {folder})"
    elif device.startswith("cuda"):
        hint = (
            "; torch.cuda.device_count() says how many GPUs PyTorch sees on this computer. For "
            "another one give machine="
        )
    return f"device {device!r} is not there; this machine has {', '.join(sorted(devices))}{hint}"


def _check_devices(spec: Spec, compute: str, devices: Mapping[str, DeviceInfo]) -> None:
    if compute not in devices:
        raise PlacementError(f"compute {_missing(compute, devices)}")
    for entry in spec.entries:
        where = f"placement entry {entry.position} ({entry.text!r})"
        parts = entry.device.split("+")
        if absent := [part for part in parts if part not in devices]:
            raise PlacementError(f"{where}: {_missing(absent[0], devices)}")
        if len(parts) > 1 and compute in parts:
            raise PlacementError(f"{where}: stripes go to donors, and {compute!r} computes")
        device = _joined(entry.device, devices)
        if isinstance(entry.share, Bytes) and entry.share.nbytes > device.total_bytes:
            raise PlacementError(
                f"{where}: asks for {entry.share.nbytes} bytes but {entry.device} holds "
                f"{device.total_bytes} ({human_bytes(device.total_bytes)}); give a smaller share"
            )


def _joined(name: str, devices: Mapping[str, DeviceInfo]) -> DeviceInfo:
    """A device, or several that hold stripes ("cpu+cuda:1"), as one."""
    parts = [devices[part] for part in name.split("+")]
    total, free = (sum(getattr(p, key) for p in parts) for key in ("total_bytes", "free_bytes"))
    return DeviceInfo(name, total, free)


def _matches(weight: WeightInfo, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in weight.names)


def _select(inventory: Inventory, patterns: Sequence[str], what: str) -> set[str]:
    """Names of the weights that any pattern matches; a pattern without a match is an error."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    found: set[str] = set()
    for pattern in patterns:
        hits = {weight.name for weight in inventory.weights if _matches(weight, pattern)}
        if not hits:
            names = [name for weight in inventory.weights for name in weight.names]
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise PlacementError(
                f"{what} pattern {pattern!r} matches no weight; "
                f"names look like {', '.join(map(repr, close or names[:3]))}"
            )
        found |= hits
    return found


def _sort(
    inventory: Inventory,
    min_bytes: int,
    keep: Sequence[str],
    offload: Sequence[str],
    rules: Sequence[tuple[str, str]],
) -> _Sorted:
    kept, off = _select(inventory, keep, "keep"), _select(inventory, offload, "offload")
    if both := sorted(kept & off):
        raise PlacementError(f"weight {both[0]!r} is matched by keep and by offload; choose one")
    ruled: dict[str, str] = {}
    for pattern, device in rules:
        try:
            target = parse_spec(f"{device},*").entries[0].device
        except SpecError as error:
            raise SpecError(f"rules={[pattern, device]!r}: {error}") from error
        for name in _select(inventory, (pattern,), "rule"):
            ruled.setdefault(name, target)  # the first rule that matches decides
    result = _Sorted()
    for weight in inventory.weights:
        why = _why(weight, min_bytes, ruled, off, kept)
        result.why[weight.name] = why
        if why is Why.RULE:
            result.ruled.append((weight, ruled[weight.name]))
        elif why is Why.OFFLOAD:
            result.offloaded.append(weight)
        else:
            (result.free if why is Why.FREE else result.fixed).append(weight)
    return result


def _why(
    weight: WeightInfo,
    min_bytes: int,
    ruled: Collection[str],
    off: Collection[str],
    kept: Collection[str],
) -> Why:
    """What decides about a weight: the first of these that is so."""
    decided = {
        Why.BUFFER: weight.kind == "buffer",
        Why.EMPTY: weight.nbytes == 0,
        Why.RULE: weight.name in ruled,
        Why.OFFLOAD: weight.name in off,
        Why.KEEP: weight.name in kept,
        Why.DTYPE: not weight.floating,
        Why.SMALL: not _movable(weight, min_bytes),
    }
    return next((why for why, is_so in decided.items() if is_so), Why.FREE)


def _lowered(sorted_: _Sorted, budget: int | None, keep: Sequence[str], compute: str) -> int:
    """The largest `min_bytes` with which what must stay fits into the compute device's budget.

    First matrices leave, the largest first, and then (0) everything that may.
    """
    ruled = [weight for weight, device in sorted_.ruled if device == compute]
    stays = sum(weight.nbytes for weight in (*sorted_.fixed, *ruled))
    if budget is None or stays <= budget:
        return MIN_BYTES
    over = stays - budget
    matrices = [
        weight.nbytes
        for weight in sorted_.fixed
        if weight.kind == "parameter"
        and _movable(weight, 1)
        and not any(_matches(weight, pattern) for pattern in keep)
    ]
    for nbytes in sorted(matrices, reverse=True):
        over -= nbytes
        if over <= 0:
            return nbytes
    return 0


def can_leave(inventory: Inventory, min_bytes: int, keep: Sequence[str]) -> set[str]:
    """Names of the weights that some plan with these options has on a donor."""
    return {
        weight.name
        for weight in inventory.weights
        if weight.kind == "parameter"
        and weight.nbytes
        and _movable(weight, min_bytes)
        and not any(_matches(weight, pattern) for pattern in keep)
    }


def _movable(weight: WeightInfo, min_bytes: int) -> bool:
    if not weight.floating:
        return False
    return min_bytes == 0 or (len(weight.shape) >= 2 and weight.nbytes >= min_bytes)


def _budget(
    entry: Entry, total: int, whole: Decimal, devices: Mapping[str, DeviceInfo]
) -> int | None:
    share = entry.share
    if isinstance(share, Rest):
        return None
    if isinstance(share, Bytes):
        return share.nbytes
    if isinstance(share, Fraction):
        return int(share.fraction * _joined(entry.device, devices).total_bytes)
    assert isinstance(share, Percent)
    return int(share.percent * total / whole)


def _make_bins(
    spec: Spec, total: int, compute: str, devices: Mapping[str, DeviceInfo]
) -> list[_Bin]:
    """Budgets in bytes, in the order of the entries, with one open bin."""
    percents = [e.share.percent for e in spec.entries if isinstance(e.share, Percent)]
    ratio_sum = sum(percents, Decimal(0)) if spec.is_ratio else Decimal(100)
    bins = [_Bin(e.device, _budget(e, total, ratio_sum, devices), e) for e in spec.entries]
    if all(b.budget is not None for b in bins):
        _open_one(bins, spec, compute)
    return bins


def _open_one(bins: list[_Bin], spec: Spec, compute: str) -> None:
    """Who takes the rest when nobody has "*": the last donor of a ratio, else RAM."""
    if spec.is_ratio:
        donors = [b for b in bins if b.device != compute]
        (donors or bins)[-1].budget = None
        return
    host = next((b for b in bins if b.device == "cpu"), None)
    if host is None:
        bins.append(_Bin("cpu", None, None))


def _place_ruled(sorted_: _Sorted, bins: list[_Bin], compute: str) -> dict[str, str]:
    placement: dict[str, str] = {}
    for weight, device in sorted_.ruled:
        target = next((b for b in bins if b.device == device), None)
        if target is None and device != compute:
            raise PlacementError(
                f"a rule sends {weight.name!r} to {device!r}, which the placement does not name; "
                f"it names {', '.join(b.device for b in bins)}"
            )
        if target is not None:
            if not target.fits(weight.nbytes):
                raise PlacementError(
                    f"a rule sends {weight.name!r} ({weight.nbytes} bytes) to {device!r}, whose "
                    f"share has {int(target.room())} bytes left; raise the share or change the rule"
                )
            target.used += weight.nbytes
        placement[weight.name] = device
    return placement


def _fill(
    weights: Sequence[WeightInfo], bins: list[_Bin], order: str, spec: Spec
) -> dict[str, str]:
    if not weights:
        return {}
    if order == "sequential":
        placed = _fill_sequential(weights, bins)
    else:
        placed = _fill_interleaved(weights, bins)
    left = [weight for weight in weights if weight.name not in placed]
    if left:
        total = sum(weight.nbytes for weight in left)
        named = ", ".join(f"{b.device} (share {b.budget})" for b in bins) or "no donor"
        raise PlacementError(
            f"{len(left)} weights ({total} bytes, {human_bytes(total)}) have no place in "
            f"{spec.text!r}: {named}; add ';disk,*' or give one entry '*'"
        )
    return placed


def _fill_sequential(weights: Sequence[WeightInfo], bins: list[_Bin]) -> dict[str, str]:
    """The first bytes to the first entry, and so on; entries after "*" take from the end."""
    opened = next((i for i, b in enumerate(bins) if b.budget is None), len(bins))
    placed: dict[str, str] = {}
    pending = list(weights)
    for target in bins[:opened]:
        while pending and target.fits(pending[0].nbytes):
            _put(pending.pop(0), target, placed)
    for target in reversed(bins[opened + 1 :]):
        while pending and target.fits(pending[-1].nbytes):
            _put(pending.pop(), target, placed)
    if opened < len(bins):
        for weight in pending:
            _put(weight, bins[opened], placed)
    return placed


def _fill_interleaved(weights: Sequence[WeightInfo], bins: list[_Bin]) -> dict[str, str]:
    """Each entry's weights are spread evenly over the bytes that are left; "*" takes the rest."""
    placed: dict[str, str] = {}
    pending = list(weights)
    for target in (b for b in bins if b.budget is not None):
        chosen = _spread(pending, int(target.room()))
        for weight in pending:
            if weight.name in chosen:
                _put(weight, target, placed)
        pending = [weight for weight in pending if weight.name not in chosen]
    for target in (b for b in bins if b.budget is None):
        for weight in pending:
            _put(weight, target, placed)
    return placed


def _put(weight: WeightInfo, target: _Bin, placed: dict[str, str]) -> None:
    target.used += weight.nbytes
    placed[weight.name] = target.device


def _spread(weights: Sequence[WeightInfo], budget: int) -> set[str]:
    """Names of weights within `budget` bytes, spread evenly over the bytes of the sequence.

    Nothing that is left out fits into what is left of the budget.
    """
    total = sum(weight.nbytes for weight in weights)
    if total <= budget:
        return {weight.name for weight in weights}
    first = _diffuse(weights, budget, budget, total)
    reached = sum(weight.nbytes for weight in weights if weight.name in first)
    # Once more with what is reachable as the goal: the gaps come out even.
    second = _diffuse(weights, reached, budget, total)
    again = sum(weight.nbytes for weight in weights if weight.name in second)
    return second if again == reached else first


def _diffuse(weights: Sequence[WeightInfo], goal: int, budget: int, total: int) -> set[str]:
    """Error diffusion: a weight is taken when the share owed reaches half of it."""
    chosen: set[str] = set()
    left, owed = budget, 0  # owed in bytes * total
    for weight in weights:
        owed += weight.nbytes * goal
        if 2 * owed >= weight.nbytes * total and weight.nbytes <= left and goal > 0:
            chosen.add(weight.name)
            left -= weight.nbytes
            owed -= weight.nbytes * total
    for weight in weights:
        if weight.name not in chosen and weight.nbytes <= left:
            chosen.add(weight.name)
            left -= weight.nbytes
    return chosen


def _check_capacity(plan: Plan, devices: Mapping[str, DeviceInfo], inventory: Inventory) -> None:
    needed = plan.bytes
    for weight in inventory.weights:
        if weight.in_file and plan.placement[weight.name] == "disk":
            needed["disk"] -= weight.nbytes  # it stays where it is
    for device, nbytes in needed.items():
        if device not in devices and "+" not in device:
            raise PlacementError(f"{_missing(device, devices)}; the rest would go there")
        free = _joined(device, devices).free_bytes
        if nbytes > free:
            hint = "add ';disk,*'" if device == "cpu" else "give it a smaller share"
            raise PlacementError(
                f"{plan.spec!r} puts {nbytes} bytes ({human_bytes(nbytes)}) on {device}, which has "
                f"{free} ({human_bytes(free)}) free; {hint}"
            )
