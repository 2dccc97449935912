# SPDX-License-Identifier: Apache-2.0
"""distribute, redistribute, undistribute: a plan made true on a module, all or nothing."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import TypeVar

import torch
from torch import nn

from distorch import _donors, _native, _ops
from distorch.display.progress import Progress, progress_of
from distorch.errors import PlacementError
from distorch.machine import machine
from distorch.planner import Plan, can_leave
from distorch.runtime import compiled, wrapped
from distorch.runtime.changes import alone, at_rest
from distorch.runtime.distribution import (
    Distribution,
    distribution_of,
    forget,
    known_distribution,
    nothing_merging,
    remember,
)
from distorch.runtime.groups import Group, group_members, has_bytes, inventory_of, unique_buffers
from distorch.runtime.module_agent import ModuleAgent
from distorch.runtime.options import Options, compute_device
from distorch.runtime.ring_room import ring_bytes
from distorch.runtime.staging import (
    Origin,
    Packing,
    current_place,
    in_place,
    plain_values,
    planned_place,
    stage,
)
from distorch.runtime.swapping import swap_in

Module = TypeVar("Module", bound=nn.Module)


@torch.inference_mode(False)  # parameters made in it could never have a gradient
def place(
    module: Module,
    plan: Plan,
    options: Options,
    groups: list[Group],
    origins: dict[str, Origin],
    *,
    resting: bool = False,
    progress: Progress = None,
) -> Module:
    """Makes the plan true. All or nothing: any exception leaves the module as it was.

    `resting`: forward passes in other threads are at rest already. `progress` is told the bytes of
    each weight as it is staged (see `progress_of`).
    """
    state = Distribution(plan, options, origins)
    known = known_distribution(module)
    patching = known.patching if known is not None else None
    moving = patching.moving(module) if patching else nullcontext()
    with alone(module, nested=True), nothing_merging(module), moving:
        return _place(module, state, groups, resting, progress)


def _place(
    module: Module, state: Distribution, groups: list[Group], resting: bool, progress: Progress
) -> Module:
    """`state` is the new one; what goes on from the old one is taken over."""
    plan, compute = state.plan, torch.device(state.plan.compute)
    known = known_distribution(module)
    if known is not None:
        state.counters, state.patching = known.counters, known.patching
        state.compiled = known.compiled
        if known.merging is not None and known.merging.is_of(module):
            state.merging = known.merging
    staged = _stage_all(module, state, groups, progress)
    buffers = {
        buffer.name: _donors.moved(buffer.tensor, compute)
        for buffer in unique_buffers(module)
        if not buffer.tensor.is_meta or not machine.needs_values(compute)
    }
    state.reserve(ring_bytes(groups, plan, state.options))
    with nullcontext() if resting else at_rest(module), ExitStack() as undo:
        swap_in(module, groups, staged, buffers, undo)
        _install(module, state, groups, undo)
        undo.pop_all()
    return module


@compiled.before_compilation
def _place_for_graphs(module: nn.Module) -> None:
    """Makes what graphs are compiled for independent of the placement."""
    state = known_distribution(module)
    if state is not None and not state.compiled:
        state.compiled = True
        try:
            found = group_members(module)
            place(module, state.plan, state.options, found, state.origins, progress=False)
        except BaseException:
            state.compiled = False
            raise


def _stage_all(
    module: nn.Module,
    state: Distribution,
    groups: list[Group],
    progress: Progress,
) -> dict[int, torch.Tensor]:
    compute = torch.device(state.plan.compute)
    places = [planned_place(group, state.plan) for group in groups]
    sharded = [place != str(compute) for place in places]
    if state.compiled:
        # "auto" changes with the share, and what is compiled must not.
        least = state.options.min_bytes
        least = 0 if isinstance(least, str) else least
        leave = can_leave(inventory_of(module, groups), least, state.options.keep)
        for i, group in enumerate(groups):
            known = group.name in state.plan.placement or _ops.is_sharded(group.first)
            sharded[i] = sharded[i] or (known and group.name in leave)
    moving = [i for i, g in enumerate(groups) if not _is_there(g, places[i], compute, sharded[i])]
    packing = Packing([groups[i] for i in moving if places[i] == "cpu"], compute)
    staged: dict[int, torch.Tensor] = {}
    total = sum(groups[i].nbytes for i in moving)
    with progress_of(progress, total, "placing") as done:
        for i in moving:
            origin = state.origins.get(groups[i].name)
            staged[i] = stage(groups[i], places[i], compute, origin, packing)
            if sharded[i] and has_bytes(groups[i].first) and not _ops.is_sharded(staged[i]):
                staged[i] = in_place(staged[i], compute, groups[i].name)
            done(groups[i].nbytes)
    return staged


def _is_there(group: Group, target: str, compute: torch.device, sharded: bool) -> bool:
    """Whether a group is where the plan wants it, in the form that it wants."""
    first = group.first
    if current_place(first) != target or first.device != compute or first.is_meta:
        return False
    if not has_bytes(first):
        return wrapped.is_on_donor(first) == (target != str(compute))
    if _ops.is_sharded(first) and _ops.state(first).decoded:
        return True
    whole = not _ops.is_sharded(first) or group.nbytes == first.untyped_storage().nbytes()
    return whole and _ops.is_sharded(first) == sharded


def _install(module: nn.Module, state: Distribution, groups: list[Group], undo: ExitStack) -> None:
    """Agents on the owning modules, counters on the weights."""
    plan, compute = state.plan, torch.device(state.plan.compute)
    tiers: dict[int, dict[str, str]] = {}
    fetched: dict[int, list[str]] = {}
    owners: dict[int, nn.Module] = {}
    for group in groups:
        for member in group.members:
            owners[id(member.owner)] = member.owner
            if _ops.is_sharded(member.parameter):
                fetched.setdefault(id(member.owner), []).append(member.key)
            if wrapped.is_on_donor(member.parameter):
                tiers.setdefault(id(member.owner), {})[member.key] = planned_place(group, plan)
    _count_and_order(groups, state)
    if tiers and id(module) not in tiers:
        # The root refuses .to(device) before any of its parts has moved.
        owners[id(module)], tiers[id(module)] = module, {}
    for key, owner in owners.items():
        undo.callback(ModuleAgent.restorer(owner))
        undo.callback(compiled.restorer(owner))
        if key in tiers:
            ModuleAgent.install(owner, compute, tiers[key])
        else:
            ModuleAgent.remove(owner)
        if state.compiled and key in fetched:
            compiled.start_fetching(owner, fetched[key])
        else:
            compiled.stop_fetching(owner)
    for part in module.modules():
        if part is not module:  # a part that was distributed by itself is now one of the whole's
            forget(part, undo)
    compiled.watch(module)
    remember(module, state, undo)


def _count_and_order(groups: list[Group], state: Distribution) -> None:
    """Counters on what is fetched, and the order in which it is likely to be."""
    streamed = [tensor for group in groups for tensor in wrapped.sharded_parts(group.first)]
    for tensor in streamed:
        _ops.count_in(tensor, _native.counters_id(state.counters))
    _ops.suggest_order(streamed)


def refresh(module: nn.Module) -> None:
    """Sizes, agents, counters and the ring for weights that took another form at their places."""
    state, groups = distribution_of(module), group_members(module)
    sizes = {group.name: group.nbytes for group in groups}
    if any(state.plan.sizes.get(name, size) != size for name, size in sizes.items()):
        state.plan = state.plan.resized(sizes)
    state.reserve(ring_bytes(groups, state.plan, state.options))
    _install(module, state, groups, ExitStack())  # nothing here is taken back


def fit_ring(module: nn.Module) -> None:
    """Gives back room in the ring that the module's weights do not need any more."""
    state = distribution_of(module)
    state.reserve(ring_bytes(group_members(module), state.plan, state.options))


def _plain(group: Group, target: torch.device) -> torch.Tensor:
    if _ops.is_sharded(group.first) and _ops.state(group.first).decoded:
        return plain_values(group, target)
    return stage(group, str(target), target)


@torch.inference_mode(False)
def unplace(module: Module, device: str | torch.device | None) -> Module:
    """A plain module on `device` (default: where it computed). All or nothing."""
    with alone(module), nothing_merging(module):
        return _unplace(module, device)


def _unplace(module: Module, device: str | torch.device | None) -> Module:
    state = distribution_of(module)
    name = state.plan.compute if device is None else compute_device(device, "device")
    if name not in (there := machine.devices()):
        raise PlacementError(f"device={name!r}: this machine has {', '.join(sorted(there))}")
    target = torch.device(name)
    groups = group_members(module)
    staged = {
        index: _plain(group, target)
        for index, group in enumerate(groups)
        if wrapped.is_on_donor(group.first) or group.first.device != target
    }
    buffers = {buffer.name: buffer.tensor.to(target) for buffer in unique_buffers(module)}
    with at_rest(module), ExitStack() as undo:
        swap_in(module, groups, staged, buffers, undo)
        for part in module.modules():
            undo.callback(ModuleAgent.restorer(part))
            undo.callback(compiled.restorer(part))
            ModuleAgent.remove(part)
            compiled.stop_fetching(part)
            forget(part, undo)
        undo.pop_all()
    return module


def check_has_values(module: nn.Module, compute: str) -> None:
    """A module without weights cannot be distributed, only loaded. PlacementError."""
    if not machine.needs_values(torch.device(compute)):
        return
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            what = "use distorch.load(model, 'file.safetensors', spec)"
            if accelerate_moves(module):
                what = (
                    "accelerate offloads it (device_map=, or enable_sequential_cpu_offload): load "
                    "the model without that"
                )
            raise PlacementError(
                f"weight {name!r} is on the meta device: it has no values to place; {what}"
            )


def accelerate_moves(module: nn.Module) -> bool:
    """Whether accelerate has hooks on it, which bring weights to a device and take them away."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())
