"""load: checkpoint -> (patch) -> donor, one tensor at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from distorch import _donors, _ops
from distorch._behaviour import attach_behaviour
from distorch.errors import FormatError, PlacementError
from distorch.formats.checkpoint import Checkpoint, match_names, open_checkpoint, weight_info
from distorch.formats.safetensors import StoredTensor
from distorch.lora import LoraSource, Patches, read_loras
from distorch.planner import Inventory, Plan
from distorch.runtime import distribution, groups
from distorch.runtime.options import Options
from distorch.runtime.staging import Origin

Module = TypeVar("Module", bound=nn.Module)
_Undo = list[tuple[dict[str, Any], str, Any]]


@dataclass
class _Job:
    """One tensor to bring: where it is stored and every place in the module that it fills."""

    stored: StoredTensor
    members: list[groups.Member]
    buffer: tuple[nn.Module, str] | None = None
    buffer_name: str = ""

    @property
    def name(self) -> str:
        return self.members[0].name if self.members else self.buffer_name


def load(
    module: Module,
    file: str | os.PathLike[str],
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    loras: Sequence[tuple[LoraSource, float]] = (),
    strict: bool = True,
    strict_loras: bool = True,
    virtual_vram: str | int | None = None,
    donor: str = "cpu",
    progress: bool | None = None,
    **options: Any,
) -> Module:
    """Fills a module from a safetensors checkpoint, each weight straight to its place.

    The module may be on the meta device or fresh: its weights are replaced, in the file's dtype.
    Weights placed on disk are read from that very file. `loras` are (file or state dict, strength)
    pairs, merged in float32 and rounded once. Options are those of `distribute`. Peak host memory:
    what stays there, the ring, two of the largest tensors.
    Raises FormatError, SpecError, PlacementError, FetchError; the module is then as it was.
    """
    opts = Options(**options)
    checkpoint = open_checkpoint(file)
    jobs = _match(module, checkpoint, strict)
    patches = read_loras(loras, [name for job in jobs for name in _names(job)], strict_loras)
    inventory = _inventory(module, jobs)
    if plan is None:
        devices = distribution.devices_for((), None)
        plan = distribution.plan_inventory(
            inventory, spec, opts, devices, virtual_vram=virtual_vram, donor=donor
        )
    else:
        distribution.check_plan_fits(plan, inventory)
    return _fill(module, jobs, plan, opts, patches=patches, progress=progress)


def _names(job: _Job) -> list[str]:
    return [member.name for member in job.members]


def _inventory(module: nn.Module, jobs: list[_Job]) -> Inventory:
    """The module as it will be: what the file brings, and what stays as it is."""
    brought = {job.name: job for job in jobs}
    filled = {id(member.parameter) for job in jobs for member in job.members}
    weights = {}
    for group in groups.group_members(module):
        rest = [member for member in group.members if id(member.parameter) not in filled]
        if rest:
            weights[rest[0].name] = groups.Group(group.begin, group.end, rest).info()
    for job in jobs:
        weights[job.name] = weight_info(job.stored, job.name, tuple(_names(job)[1:]))
    order = {member.name: i for i, member in enumerate(groups.named_members(module))}
    parameters = sorted(
        (weight for name, weight in weights.items() if name in order),
        key=lambda weight: order[weight.name],
    )
    buffers = []
    for buffer in groups.buffer_infos(module):
        new = brought.get(buffer.name)
        info = buffer if new is None else weight_info(new.stored, buffer.name)
        buffers.append(replace(info, kind="buffer"))
    return Inventory((*parameters, *buffers))


def _match(module: nn.Module, checkpoint: Checkpoint, strict: bool) -> list[_Job]:
    """Pairs stored tensors with parameters and buffers. FormatError on what does not fit."""
    by_parameter: dict[int, list[groups.Member]] = {}
    for member in groups.named_members(module):
        by_parameter.setdefault(id(member.parameter), []).append(member)
    buffers = {name: (owner, key) for name, owner, key, _ in groups.unique_buffers(module)}
    wanted = [m.name for ms in by_parameter.values() for m in ms] + list(buffers)
    names = match_names(checkpoint.tensors, wanted)
    jobs, missing = [], []
    for members in by_parameter.values():
        stored = next((names[m.name] for m in members if m.name in names), None)
        if stored is None:
            missing.append(members[0].name)
            continue
        jobs.append(_Job(checkpoint.tensors[stored], members))
    for name, (owner, key) in buffers.items():
        if name in names:
            jobs.append(_Job(checkpoint.tensors[names[name]], [], (owner, key), name))
        elif key not in owner._non_persistent_buffers_set:
            missing.append(name)
    unexpected = sorted(set(checkpoint.tensors) - set(names.values()))
    _report_keys(module, checkpoint, missing, unexpected, strict)
    _check_shapes(jobs)
    return jobs


def _report_keys(
    module: nn.Module,
    checkpoint: Checkpoint,
    missing: list[str],
    unexpected: list[str],
    strict: bool,
) -> None:
    meta = [name for name, p in module.named_parameters() if p.is_meta and name in set(missing)]
    if (missing or unexpected) and (strict or meta):
        raise FormatError(
            f"{checkpoint.path!r} does not fit this {type(module).__name__}: "
            f"{len(missing)} missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3]) or '-'}). "
            "Build the module with the checkpoint's own configuration"
            + ("" if meta else ", or pass strict=False")
        )


def _check_shapes(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.buffer is not None:
            owner, key = job.buffer
            shape = tuple(owner._buffers[key].shape)  # type: ignore[union-attr]
        else:
            shape = tuple(job.members[0].parameter.shape)
        if shape != job.stored.shape:
            raise FormatError(
                f"{job.stored.name!r}: the file has shape {job.stored.shape}, the module wants "
                f"{shape}; build the module with the checkpoint's own configuration"
            )


def _check_no_meta_left(module: nn.Module, jobs: list[_Job]) -> None:
    filled = {id(job.buffer[0]) for job in jobs if job.buffer is not None}
    for name, owner, _, buffer in groups.unique_buffers(module):
        if buffer.is_meta and id(owner) not in filled:
            raise PlacementError(
                f"buffer {name!r} is on the meta device and the checkpoint does not have it; "
                "create the module so that only its parameters are on meta (for example "
                "accelerate.init_empty_weights(include_buffers=False)), or set the buffer first"
            )


def _fill(
    module: Module,
    jobs: list[_Job],
    plan: Plan,
    options: Options,
    *,
    patches: Patches,
    progress: bool | None,
) -> Module:
    compute = torch.device(plan.compute)
    _check_no_meta_left(module, jobs)
    values, origins = [], {}
    show = sys.stderr.isatty() if progress is None else progress
    total = sum(job.stored.nbytes for job in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not show) as bar:
        for job in jobs:
            value, origin = _bring(job, plan, compute, patches)
            values.append(value)
            if origin is not None:
                origins[job.name] = origin
            bar.update(job.stored.nbytes)
    undo: _Undo = []
    try:
        _swap_in(module, jobs, values, compute, undo)
        found = groups.group_members(module)
        return distribution.place(module, _resized(plan, found), options, found, origins)
    except BaseException:
        for table, key, value in reversed(undo):
            table[key] = value
        raise


def _resized(plan: Plan, found: list[groups.Group]) -> Plan:
    """The plan with the sizes that patching left (a patched fp8 weight is larger)."""
    sizes = dict(plan.sizes) | {group.name: group.nbytes for group in found}
    known = {name: size for name, size in sizes.items() if name in plan.placement}
    return Plan(
        plan.placement, known, plan.compute, plan.spec, plan.order, plan.floor, plan.options
    )


def _bring(
    job: _Job, plan: Plan, compute: torch.device, patches: Patches
) -> tuple[torch.Tensor, Origin | None]:
    """The weight at its place. Its origin when the bytes are the file's own."""
    stored, target = job.stored, plan.placement[job.name]
    patched = job.buffer is None and patches.touches(_names(job))
    origin = Origin(stored.path, stored.offset, stored.nbytes)
    if stored.nbytes == 0:
        return torch.empty(stored.shape, dtype=stored.dtype, device=compute), None
    if target == "disk" and not patched:
        sharded = _ops.shard_file(
            stored.path,
            stored.offset,
            stored.shape,
            stored.dtype,
            compute=compute,
            name=job.name,
        )
        return sharded, origin
    value = torch.empty(stored.shape, dtype=stored.dtype)
    _ops.read_file(stored.path, stored.offset, value)
    if patched:
        value = patches.apply(_names(job), value.to(compute))
    if target == plan.compute:
        return value.to(compute), None if patched else origin
    return _donors.shard_on(target, value, compute, job.name), None if patched else origin


def _swap_in(
    module: nn.Module,
    jobs: list[_Job],
    values: list[torch.Tensor],
    compute: torch.device,
    undo: _Undo,
) -> None:
    """New parameters in every place; what was there is noted in `undo` first."""
    for job, value in zip(jobs, values, strict=True):
        if job.buffer is not None:
            owner, key = job.buffer
            undo.append((owner._buffers, key, owner._buffers[key]))
            owner._buffers[key] = value.to(compute)
            continue
        old = job.members[0].parameter
        fresh = nn.Parameter(value, requires_grad=old.requires_grad and _can_train(value))
        fresh.__dict__.update({k: v for k, v in old.__dict__.items() if not callable(v)})
        if _ops.is_sharded(fresh):
            attach_behaviour(fresh)
        for member in job.members:
            undo.append((member.owner._parameters, member.key, old))
            member.owner._parameters[member.key] = fresh


def _can_train(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
