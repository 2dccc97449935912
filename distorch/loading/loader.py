"""load: the files, the module and the plan brought together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from distorch import _ops
from distorch._behaviour import as_parameter, attach_behaviour
from distorch.errors import SpecError
from distorch.formats.checkpoint import open_checkpoint
from distorch.formats.naming import fit_names
from distorch.loading.bring import bring_all
from distorch.loading.job import Job
from distorch.loading.match import check_no_meta_left, match, tie_again
from distorch.lora import LoraSource, Patches, are_low_rank
from distorch.patching import (
    Original,
    Patching,
    PatchOptions,
    base_name,
    check_plain_numbers,
    merge_in_background,
    new_reader,
    patches_on,
)
from distorch.planner import Inventory, Plan
from distorch.runtime import distribution, groups
from distorch.runtime.options import Options
from distorch.runtime.staging import Origin

Module = TypeVar("Module", bound=nn.Module)
_Undo = list[tuple[dict[str, Any], str, Any]]


def load(
    module: Module,
    file: str | os.PathLike[str],
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    loras: Sequence[tuple[LoraSource, float]] = (),
    strict: bool = True,
    strict_loras: bool = True,
    lora_mode: str = "merge",
    patched_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | None = None,
    resident: str = "quantised",
    virtual_vram: str | int | None = None,
    donor: str = "cpu",
    progress: bool | None = None,
    **options: Any,
) -> Module:
    """Fills a module from a checkpoint, each weight straight to its place.

    Names are the module's own, or, for modules of diffusers, those of the original checkpoint
    (flux1-dev.safetensors), and for modules of transformers, llama.cpp's in GGUF files.

    `file`: safetensors (one file, or sharded with its index), GGUF, a torch file, or a folder with
    one of them. The module may be on the meta device or fresh: its weights are replaced, in the
    file's dtype; `dtype` converts floating ones on the way. Weights whose numbers have scales in
    the file and none in the module (fp8, int8), and blocks of GGUF files, stay as narrow as they
    are everywhere and become the module's dtype when fetched; `resident="dequantised"` widens once
    and for all those that stay on the compute device. Weights placed on disk are read from that
    very file.

    `loras` are (file or state dict, strength) pairs, added in float32 and rounded once (see
    `set_loras`); `lora_mode` "merge" (now), "fetch" (each time: strengths can be changed at once,
    same bits) or "background" (as "fetch" at first, and merged while the model is used: see
    `finish_merging`);
    `patched_dtype` for patched weights of 8 bits or less ("bfloat16", "float16", "float32"; "base"
    rounds back, plain numbers without scales only). Other
    options are those of `distribute`. Peak host memory: what stays there, the ring, two of the
    largest tensors, factors of LoRAs.
    Raises FormatError, SpecError, PlacementError, FetchError; the module is then as it was.
    """
    opts = Options(**options)
    patching = PatchOptions.checked(lora_mode, patched_dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype={dtype!r}: expected a floating torch.dtype, such as torch.bfloat16")
    if resident not in ("quantised", "dequantised"):
        raise SpecError(f"resident={resident!r}: expected 'quantised' or 'dequantised'")
    checkpoint = fit_names(open_checkpoint(file, quantised=True), module)
    tie_again(module, checkpoint)
    jobs = match(module, checkpoint, strict, dtype)
    reader = new_reader(module)
    patches, found = reader.read(loras, strict_loras)
    _assign(jobs, patches, patching)
    if plan is None:
        devices = distribution.devices_for((), None)
        for job in jobs if resident == "dequantised" else ():
            job.widened = job.rows is not None  # as it would be on the compute device
        plan = distribution.plan_inventory(
            _inventory(module, jobs), spec, opts, devices, virtual_vram=virtual_vram, donor=donor
        )
        plan = _narrowed(plan, jobs)
    else:
        distribution.check_plan_fits(plan, _inventory(module, jobs))
    _fill(module, jobs, plan, opts, progress=progress)
    known = Patching(reader, patching, loras=found)
    _remember(module, jobs, known)
    if patching.mode == "background":
        merge_in_background(module)
    return module


def _narrowed(plan: Plan, jobs: list[Job]) -> Plan:
    """The plan, once it is known who stays on the compute device: all others are narrow."""
    for job in jobs:
        job.widened = job.widened and plan.placement[job.name] == plan.compute
    return plan.resized({job.name: job.nbytes for job in jobs})


def _remember(module: nn.Module, jobs: list[Job], known: Patching) -> None:
    """Where originals are and what is on them, for set_loras."""
    for job in jobs:
        if job.members:
            original = Original(job.stored, job.rows, job.dtype)
            original.put(job.members[0].owner._parameters[job.members[0].key])  # type: ignore[arg-type]
            name = base_name(job.name)
            known.originals[name] = original
            if job.patches:
                known.applied[name] = job.patches
    distribution.distribution_of(module).patching = known


def _assign(jobs: list[Job], patches: Patches, options: PatchOptions) -> None:
    """Tells each job what is to be added to it."""
    for job in jobs:
        if job.buffer is not None:
            continue
        job.patches = patches_on(job.members, patches)
        if job.patches:
            if job.rows is None:
                check_plain_numbers(job.members[0], job.stored.dtype)
            narrow = job.stored.dtype if job.dtype.itemsize == 1 or job.rows else job.dtype
            options.check_rounds_to(job.rows, job.name)
            job.patched_dtype = options.dtype_of(narrow, job.module_dtype)
            fits = job.rows is not None or job.dtype == job.stored.dtype
            known = job.patched_dtype in _ops.DECODED_DTYPES
            low_rank = are_low_rank(job.patches)
            whole = job.rows is None or job.rows.whole_rows(job.stored.shape)
            job.at_fetch = options.at_fetch and fits and known and low_rank and whole


def _inventory(module: nn.Module, jobs: list[Job]) -> Inventory:
    """The module as it will be: what the file brings, and what stays as it is."""
    brought = {job.name: job for job in jobs}
    filled = {id(member.parameter) for job in jobs for member in job.members}
    weights = {}
    for group in groups.group_members(module):
        rest = [member for member in group.members if id(member.parameter) not in filled]
        if rest:
            weights[rest[0].name] = groups.Group(group.begin, group.end, rest).info()
    for job in jobs:
        weights[job.name] = job.info()
    order = {member.name: i for i, member in enumerate(groups.named_members(module))}
    parameters = sorted(
        (weight for name, weight in weights.items() if name in order),
        key=lambda weight: order[weight.name],
    )
    buffers = []
    for buffer in groups.buffer_infos(module):
        new = brought.get(buffer.name)
        info = buffer if new is None else new.info()
        buffers.append(replace(info, kind="buffer"))
    return Inventory((*parameters, *buffers))


@torch.inference_mode(False)
@torch.no_grad()
def _fill(
    module: Module, jobs: list[Job], plan: Plan, options: Options, *, progress: bool | None
) -> Module:
    check_no_meta_left(module, jobs)
    values = bring_all(jobs, plan, progress)
    origins = {
        job.name: Origin(job.stored.path, job.stored.offset, job.stored.nbytes)
        for job in jobs
        if job.is_stored_form and job.stored.in_one_range and job.stored.nbytes
    }
    undo: _Undo = []
    try:
        _swap_in(module, jobs, values, torch.device(plan.compute), undo)
        found = groups.group_members(module)
        return distribution.place(module, plan, options, found, origins)
    except BaseException:
        for table, key, value in reversed(undo):
            table[key] = value
        raise


def _swap_in(
    module: nn.Module,
    jobs: list[Job],
    values: list[torch.Tensor],
    compute: torch.device,
    undo: _Undo,
) -> None:
    """New parameters in every place; what was there is noted in `undo` first."""
    for job, value in zip(jobs, values, strict=True):
        if job.buffer is not None:
            undo += [(o._buffers, key, job.buffer.tensor) for o, key in job.buffer.places]
            job.buffer.put(value.to(compute))
            continue
        old = job.members[0].parameter
        trains = old.requires_grad and _can_train(value)
        if groups.has_bytes(old):
            fresh = as_parameter(value, trains, old)
        else:  # a wrapper of other tensors, which the file's replaces
            fresh = nn.Parameter(value, requires_grad=trains)
        if _ops.is_sharded(fresh):
            attach_behaviour(fresh)
        for member in job.members:
            undo.append((member.owner._parameters, member.key, old))
            member.owner._parameters[member.key] = fresh


def _can_train(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
