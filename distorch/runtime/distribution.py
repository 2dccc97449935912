"""distribute, redistribute, undistribute: a plan made true on a module, all or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from distorch import _donors, _native, _ops
from distorch._behaviour import replace_data
from distorch._progress import Progress, progress_of
from distorch.errors import PlacementError
from distorch.planner import (
    Plan,
    can_leave,
    parse_bytes,
)
from distorch.runtime import compiled, machine, wrapped
from distorch.runtime.at_rest import at_rest
from distorch.runtime.groups import (
    Group,
    group_members,
    has_bytes,
    inventory_of,
    unique_buffers,
)
from distorch.runtime.module_agent import ModuleAgent
from distorch.runtime.options import Options, check_module, compute_device
from distorch.runtime.staging import (
    Origin,
    Packing,
    current_place,
    in_place,
    member_tensor,
    plain_values,
    stage,
)

Module = TypeVar("Module", bound=nn.Module)
_Undo = list[Callable[[], None]]

_KEY = "_distorch"
_AUTO_RING_BYTES = 128 << 20


def _new_counters() -> Any:
    return _native.Counters()


class Merger(Protocol):
    """A thread that merges LoRAs into weights while the module is used (`patching.background`)."""

    left: dict[str, int]  # weight -> bytes that are not merged yet
    error: BaseException | None  # what ended it too early

    def held(self) -> AbstractContextManager[None]:
        """Nothing is merged meanwhile. Afterwards it goes on with what is pending then."""

    def finish(self, progress: Progress = None) -> None:
        """Waits for the last weight. Raises what merging raised."""


@dataclass
class Distribution:
    """What a distributed module remembers: its plan, its counters, its room in the ring."""

    plan: Plan
    options: Options
    origins: dict[str, Origin] = field(default_factory=dict)
    counters: Any = field(default_factory=_new_counters)
    reservation: Any = None
    ring_bytes: int = 0
    patching: Any = None  # LoRAs on it and where its originals are (distorch.patching)
    merging: Merger | None = None  # since the LoRA mode was "background" for the first time
    compiled: bool = False  # see Note [Weights in compiled graphs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Distribution:
        copied = Distribution(self.plan, self.options, dict(self.origins))
        copied.patching = self.patching.copy(memo) if self.patching is not None else None
        copied.reserve(self.ring_bytes)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # A saved module is a plain one: its weights are in the file.
        return _nothing, ()

    def lasting_options(self) -> Options:
        """The options that hold until others are given: it goes on computing where it does.

        On a CPU that nobody asked for, it does so only until a placement names an accelerator.
        """
        given = self.options.compute is not None or self.plan.compute != "cpu"
        return dataclasses.replace(self.options, compute=self.plan.compute if given else None)

    def reserve(self, nbytes: int) -> None:
        """Makes the ring of the compute device at least so large while this object lives."""
        # The old room goes first only when the new one is there.
        self.ring_bytes = nbytes
        self.reservation = _native.Reservation(str(torch.device(self.plan.compute)), nbytes)


def _nothing() -> None:
    return None


def distribution_of(module: nn.Module) -> Distribution:
    """The distribution of a module. PlacementError when it has none."""
    check_module(module)
    found = module.__dict__.get(_KEY)
    if not isinstance(found, Distribution) and hasattr(module, "_orig_mod"):
        raise PlacementError(
            "this is torch.compile's wrapper of a module: pass what it wraps, model._orig_mod, or "
            "call model.compile(), which needs no wrapper"
        )
    if not isinstance(found, Distribution):
        raise PlacementError(
            f"this {type(module).__name__} is not distributed: call distorch.distribute(model, "
            "spec) first (on the module that you pass here, not on a part of it)"
        )
    return found


def is_distributed(module: nn.Module) -> bool:
    """Whether `distribute` or `load` has placed this module."""
    return isinstance(module.__dict__.get(_KEY), Distribution)


@contextmanager
def nothing_merging(module: nn.Module) -> Iterator[None]:
    """No thread merges LoRAs into the module's weights meanwhile."""
    state = module.__dict__.get(_KEY)
    merging = state.merging if isinstance(state, Distribution) else None
    with merging.held() if merging is not None else nullcontext():
        yield


def _place_of(group: Group, plan: Plan) -> str:
    """Where the plan has a group; of one that came or was renamed since, where it is."""
    return plan.placement.get(group.name) or current_place(group.first)


def _fetched_bytes(group: Group, plan: Plan) -> int:
    """Room in the ring that a fetch of this group takes at most; 0: operators use it in place."""
    compute = plan.compute
    if _ops.is_sharded(group.first) and _ops.state(group.first).decoded:
        decoded = group.first.untyped_storage().nbytes()
        from_memory = compute == "cpu" and _place_of(group, plan) == "cpu"
        return decoded if from_memory else decoded + group.nbytes
    # The CPU computes with what is in RAM in place.
    in_place = (compute, "cpu") if compute == "cpu" else (compute,)
    return 0 if _place_of(group, plan) in in_place else group.nbytes


def is_table(group: Group) -> bool:
    """Whether the group belongs to embeddings alone, which look rows up. If such a table is larger
    than the ring, only these rows are fetched (csrc/hook/embedding.cpp).
    """
    return all(isinstance(m.owner, nn.Embedding) and m.key == "weight" for m in group.members)


def ring_bytes(groups: Sequence[Group], plan: Plan, options: Options) -> int:
    """Bytes of look-ahead: at least two of the largest weights that are fetched whole."""
    page = 4096
    sizes = {g.name: n + 2 * page for g in groups if (n := _fetched_bytes(g, plan))}
    tables = {group.name for group in groups if is_table(group)}
    largest = max((n for name, n in sizes.items() if name not in tables), default=0)
    wanted = max(2 * largest, _AUTO_RING_BYTES)
    if options.prefetch != "auto":
        wanted = parse_bytes(options.prefetch)
    whole = sum(n for name, n in sizes.items() if name not in tables or n <= wanted)
    return min(whole, wanted)  # a ring that holds everything is never larger


@torch.inference_mode(False)  # parameters made in it could never have a gradient
def place(
    module: Module,
    plan: Plan,
    options: Options,
    groups: list[Group],
    origins: dict[str, Origin],
    *,
    progress: Progress = None,
) -> Module:
    """Makes the plan true. All or nothing: any exception leaves the module as it was.

    `progress` is told the bytes of each weight as it is staged (see `progress_of`).
    """
    state = Distribution(plan, options, origins)
    known = module.__dict__.get(_KEY)
    patching = known.patching if isinstance(known, Distribution) else None
    with nothing_merging(module), patching.moving(module) if patching else nullcontext():
        return _place(module, state, groups, progress)


def _place(module: Module, state: Distribution, groups: list[Group], progress: Progress) -> Module:
    """`state` is the new one; what goes on from the old one is taken over."""
    plan, compute = state.plan, torch.device(state.plan.compute)
    known = module.__dict__.get(_KEY)
    if isinstance(known, Distribution):
        state.counters, state.patching = known.counters, known.patching
        state.merging, state.compiled = known.merging, known.compiled
    staged = _stage_all(module, state, groups, progress)
    buffers = {
        buffer.name: _donors.moved(buffer.tensor, compute)
        for buffer in unique_buffers(module)
        if not buffer.tensor.is_meta or not machine.needs_values(compute)
    }
    state.reserve(ring_bytes(groups, plan, state.options))
    undo: _Undo = []
    with at_rest(module):
        try:
            _swap_in(module, groups, staged, buffers, undo)
            _install(module, state, groups, undo)
        except BaseException:
            _take_back(undo)
            raise
    return module


@compiled.before_compilation
def _place_for_graphs(module: nn.Module) -> None:
    """Makes what graphs are compiled for independent of the placement."""
    state = module.__dict__.get(_KEY)
    if isinstance(state, Distribution) and not state.compiled:
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
    places = [_place_of(group, state.plan) for group in groups]
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


def _take_back(undo: _Undo) -> None:
    for step in reversed(undo):
        step()


def _swap_in(
    module: nn.Module,
    groups: list[Group],
    staged: dict[int, torch.Tensor],
    buffers: dict[str, torch.Tensor],
    undo: _Undo,
) -> None:
    """Gives the module what was staged; how to go back is noted first, step by step.

    Waits for devices whose memory the module gets, and then for those whose memory it lets go of.
    """
    machine.synchronize_all(str(t.device) for t in staged.values() if not _ops.is_sharded(t))
    let_go = [current_place(groups[i].first) for i in staged if not groups[i].first.is_meta]
    for index, tensor in staged.items():
        group = groups[index]
        parameters = {id(member.parameter): member.parameter for member in group.members}
        values = {i: member_tensor(tensor, group, p) for i, p in parameters.items()}
        for identity, parameter in parameters.items():
            if parameter.is_inference() or wrapped.is_wrapper(parameter):
                _replace_parameter(group, parameter, values[identity], undo)
                continue
            _give(parameter, values[identity], undo)
    for buffer in unique_buffers(module):
        if buffer.name in buffers:
            undo.append(partial(buffer.put, buffer.tensor))
            buffer.put(buffers[buffer.name])
    machine.synchronize_all(let_go)


def _give(parameter: nn.Parameter, value: torch.Tensor, undo: _Undo) -> None:
    """The same bits from another place."""
    if _can_adopt(parameter, value):
        undo.append(partial(_adopt, parameter, _ops.share(parameter.detach())))
        _adopt(parameter, value)
    else:
        undo.append(partial(replace_data, parameter, parameter.data))
        replace_data(parameter, value)


def _adopt(parameter: nn.Parameter, value: torch.Tensor) -> None:
    while not _ops.adopt(parameter, value, _ops.moves(parameter)):
        pass  # another thread moved it between the two calls


def _can_adopt(parameter: nn.Parameter, value: torch.Tensor) -> bool:
    """Whether only the place differs, so that the tensor itself need not change."""
    return (
        _ops.is_sharded(parameter)
        and _ops.is_sharded(value)
        and parameter.device == value.device
        and parameter.dtype == value.dtype
        and parameter.shape == value.shape
        and parameter.stride() == value.stride()
        and parameter.storage_offset() == value.storage_offset()
        and parameter.untyped_storage().nbytes() == value.untyped_storage().nbytes()
    )


def _replace_parameter(
    group: Group, parameter: nn.Parameter, value: torch.Tensor, undo: _Undo
) -> None:
    """A new object for a parameter that cannot get other data: one that was made in inference mode
    has no version counter, which the new data's dispatch would ask for; a wrapper's parts are
    attributes of the object.
    """
    if wrapped.is_wrapper(value):
        fresh = wrapped.as_parameter(value, parameter.requires_grad)
    else:
        fresh = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
        replace_data(fresh, value)
    for member in group.members:
        if member.parameter is parameter:
            undo.append(partial(member.owner._parameters.__setitem__, member.key, parameter))
            member.owner._parameters[member.key] = fresh
            member.parameter = fresh


def _install(module: nn.Module, state: Distribution, groups: list[Group], undo: _Undo) -> None:
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
                tiers.setdefault(id(member.owner), {})[member.key] = _place_of(group, plan)
    _count_and_order(groups, state)
    if tiers and id(module) not in tiers:
        # The root refuses .to(device) before any of its parts has moved.
        owners[id(module)], tiers[id(module)] = module, {}
    for key, owner in owners.items():
        undo.append(ModuleAgent.restorer(owner))
        undo.append(partial(setattr, owner, "__class__", type(owner)))
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
            _forget(part, undo)
    compiled.watch(module)
    # Last, and in one step: from here on it is done.
    module.__dict__[_KEY] = state


def _count_and_order(groups: list[Group], state: Distribution) -> None:
    """Counters on what is fetched, and the order in which it is likely to be."""
    streamed = [tensor for group in groups for tensor in wrapped.sharded_parts(group.first)]
    for tensor in streamed:
        _ops.count_in(tensor, state.counters.id)
    _ops.suggest_order(streamed)


def refresh(module: nn.Module) -> None:
    """Sizes, agents, counters and the ring for weights that took another form at their places."""
    state, groups = distribution_of(module), group_members(module)
    sizes = {group.name: group.nbytes for group in groups}
    if any(state.plan.sizes.get(name, size) != size for name, size in sizes.items()):
        state.plan = state.plan.resized(sizes)
    state.reserve(ring_bytes(groups, state.plan, state.options))
    _install(module, state, groups, [])


def fit_ring(module: nn.Module) -> None:
    """Gives back room in the ring that the module's weights do not need any more."""
    state = distribution_of(module)
    state.reserve(ring_bytes(group_members(module), state.plan, state.options))


def _forget(module: nn.Module, undo: _Undo) -> None:
    """Takes a module's own distribution away, if it has one."""
    if is_distributed(module):
        undo.append(partial(module.__dict__.__setitem__, _KEY, module.__dict__[_KEY]))
        module.__dict__.pop(_KEY)


def _plain(group: Group, target: torch.device) -> torch.Tensor:
    if _ops.is_sharded(group.first) and _ops.state(group.first).decoded:
        return plain_values(group, target)
    return stage(group, str(target), target)


@torch.inference_mode(False)
def unplace(module: Module, device: str | torch.device | None) -> Module:
    """A plain module on `device` (default: where it computed). All or nothing."""
    with nothing_merging(module):
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
    undo: _Undo = []
    with at_rest(module):
        try:
            _swap_in(module, groups, staged, buffers, undo)
            for part in module.modules():
                undo.append(ModuleAgent.restorer(part))
                undo.append(partial(setattr, part, "__class__", type(part)))
                ModuleAgent.remove(part)
                compiled.stop_fetching(part)
                _forget(part, undo)
        except BaseException:
            _take_back(undo)
            raise
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


__all__ = [
    "Distribution", "Options", "accelerate_moves", "check_has_values", "distribution_of",
    "fit_ring", "group_members", "inventory_of", "is_distributed", "nothing_merging", "place",
    "refresh", "unplace",
]  # fmt: skip
