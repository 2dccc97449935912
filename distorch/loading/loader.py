# SPDX-License-Identifier: Apache-2.0
"""load: the files, the module and the plan brought together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from distorch import _ops
from distorch._behaviour import as_parameter, attach_behaviour
from distorch.display.progress import Progress, check_progress
from distorch.formats.plain_names import base_name
from distorch.loading.bring import bring_all
from distorch.loading.job import Job
from distorch.loading.prepare import OF_LOAD, Ready, Request, Resident, prepare
from distorch.lora import LoraSource
from distorch.machine import machine
from distorch.patching import (
    LoraMode,
    Original,
    follow_widths,
    merge_in_background,
    widened_in,
)
from distorch.planner import Plan
from distorch.runtime import distribution, groups, placing
from distorch.runtime.changes import alone, at_rest
from distorch.runtime.options import PlacementOptions, check_module
from distorch.runtime.staging import Origin, current_place

Module = TypeVar("Module", bound=nn.Module)


def load(
    module: Module,
    file: str | os.PathLike[str],
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    loras: Sequence[tuple[LoraSource, float]] = (),
    strict: bool = True,
    strict_loras: bool = True,
    lora_mode: LoraMode = "merge",
    patched_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    resident: Resident = "quantised",
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    verify: bool = False,
    progress: Progress = None,
    **options: Unpack[PlacementOptions],
) -> Module:
    """Fills a module from a checkpoint, each weight straight to its place.

    Names in the file are the module's own. For modules of diffusers they may be those of the
    original checkpoint (flux1-dev.safetensors), and for modules of transformers those of llama.cpp
    in GGUF files.

    Weights with fewer bits than the module's (fp8 and int8 with scales, blocks of GGUF) stay as
    they are on their donors, and become the module's dtype when they are fetched. Weights that are
    placed on disk are read from the checkpoint itself, unless they change on the way (`dtype`,
    merged LoRAs, nvfp4, mxfp8, asym_w4a8_int8).

    Exactly one of `spec`, `plan` and `virtual_vram` says where the weights go.

    The module may be in use: forward passes that other threads have begun end first, and new ones
    wait.

    In RAM there are at most: what stays there, the ring, two of the largest tensors, and factors of
    LoRAs.

    Args:
        module: A module on the meta device (see `init_empty_weights`), or any other. Its weights
            are replaced.
        file: A safetensors file (or the index of several), a GGUF file, a torch file, or a folder
            with one of them.
        spec: A placement string, such as "cuda:0,2.5gb;cpu,*".
        plan: A plan, in place of a spec.
        loras: Pairs of a LoRA (a file or a state dict) and its strength. See `set_loras`.
        strict: Whether every name has to be in both the file and the module.
        strict_loras: Whether every key of a LoRA has to fit a weight.
        lora_mode: "merge", "fetch" or "background". See `set_loras`.
        patched_dtype: The dtype of weights of 8 bits or less that a LoRA is merged into:
            "bfloat16", "float16" or "float32". "base" rounds back (plain numbers without scales
            only).
        dtype: Converts floating weights on the way. "module": each to what the module has there.
            If not given, the file's.
        resident: "quantised", or "dequantised": weights that stay on the compute device are made
            wide once and for all.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        verify: Compares every byte of the file with what it was when the file was verified first,
            whenever it is read: at the load, at fetches, and for LoRAs. The first time, the file
            is read whole, and its checksums are kept in the cache folder. (A function given as
            `progress` hears nothing of that.)
        progress: As in `distribute`.
        options: Those of `distribute`.

    Returns:
        The module itself.

    Raises:
        FormatError: The file is missing, damaged, or does not fit the module.
        SpecError: The spec or an option is wrong.
        PlacementError: The placement cannot be done.
        FetchError: A file could not be read, its bytes are not what they were (`verify`), or a
            donor failed.

    After any of them the module is as it was.
    """
    check_progress(progress)
    request = Request(
        spec, plan, virtual_vram, donor, options, loras=loras, strict=strict,
        strict_loras=strict_loras, lora_mode=lora_mode, patched_dtype=patched_dtype, dtype=dtype,
        resident=resident, verify=verify,
        known=("spec", "plan", "virtual_vram", "donor", "progress", *OF_LOAD),
    )  # fmt: skip
    check_module(module)
    with (
        request.verifying(file, progress),
        alone(module),
        distribution.nothing_merging(module),
    ):
        return fill(module, prepare(module, file, request), progress=progress)


def fill(module: Module, ready: Ready, *, progress: Progress = None) -> Module:
    """A load that is decided, done. All or nothing: an error leaves the module as it was."""
    # What merges LoRAs into the weights that were there goes on with those that come.
    with alone(module, nested=True), distribution.nothing_merging(module):
        _fill(module, ready, progress=progress)
        _remember(module, ready)
        if ready.patching.options.mode == "background":
            merge_in_background(module)
    return module


def _remember(module: nn.Module, ready: Ready) -> None:
    """Where originals are and what is on them, for set_loras."""
    known = ready.patching
    for job in ready.jobs:
        if job.members:
            original = Original(job.stored, job.rows, job.dtype, opened=ready.opened)
            original.put(job.members[0].owner._parameters[job.members[0].key])  # type: ignore[arg-type]
            name = base_name(job.name)
            known.originals[name] = original
            if job.patches:
                known.applied[name] = job.patches
    distribution.distribution_of(module).patching = known


@torch.inference_mode(False)
@torch.no_grad()
def _fill(module: Module, ready: Ready, *, progress: Progress) -> Module:
    jobs, plan = ready.jobs, ready.plan
    wide = {*widened_in(module), *ready.patching.widened}  # before, and from now on
    values = bring_all(jobs, plan, progress)
    origins = {
        job.name: Origin(job.stored.path, job.stored.offset, job.stored.nbytes)
        for job in jobs
        if job.is_stored_form and job.stored.in_one_range and job.stored.nbytes
    }
    with at_rest(module, whole_passes=True), ExitStack() as undo:
        undo.callback(follow_widths, module, wide)
        # Passes may have been issued that still read what is there now.
        owners = [job.members[0].parameter for job in jobs if job.members]
        machine.synchronize_all(current_place(old) for old in owners if not old.is_meta)
        _swap_in(jobs, values, torch.device(plan.compute), undo)
        follow_widths(module, wide)
        found = groups.group_members(module)
        placing.place(module, plan, ready.options, found, origins, resting=True, progress=False)
        undo.pop_all()
    return module


def _swap_in(
    jobs: list[Job], values: list[torch.Tensor], compute: torch.device, undo: ExitStack
) -> None:
    """New parameters in every place; the way back is put on `undo` first."""
    for job, value in zip(jobs, values, strict=True):
        if job.buffer is not None:
            undo.callback(job.buffer.put, job.buffer.tensor)
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
            undo.callback(member.owner._parameters.__setitem__, member.key, old)
            member.owner._parameters[member.key] = fresh


def _can_train(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
