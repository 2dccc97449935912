"""The functions that users call on a module that exists."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from distorch._progress import Progress, check_progress
from distorch.errors import warn_at_caller
from distorch.planner import Plan
from distorch.runtime import distribution, planning
from distorch.runtime.options import Options, PlacementOptions, check_module, check_one_placement

Module = TypeVar("Module", bound=nn.Module)
_ARGUMENTS = ("spec", "plan", "virtual_vram", "donor", "progress")


def distribute(
    module: Module,
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    progress: Progress = None,
    **options: Unpack[PlacementOptions],
) -> Module:
    """Places a module's weights; returns the same module.

    Where they go is said by one of: `spec`, a placement string such as "cuda:0,2.5gb;cpu,*";
    `plan`, a saved one; `virtual_vram`, the bytes to give away to `donor` (if not given: "cpu", or
    "disk" where the CPU computes).

    Options: `compute` the device that runs the model; `order` "interleaved" | "sequential";
    `min_bytes` (1048576): smaller and 1-D tensors stay resident. With 0, every floating or
    quantised parameter may leave. With "auto", as many as needed leave, the largest first, where
    the compute device's share is too small for what would stay. `keep` / `offload` name patterns
    of what stays and of what leaves. `rules` [(pattern, device)]. `prefetch` bytes of look-ahead
    ("auto", 0 = none). `compress` "auto" | "never". Bytes are numbers or "1mb".

    What is kept or small stays on the compute device even if it is more than its share. Then there
    is a PlacementWarning, and `report` is not `ok`. (A share of 0 asks for no more than this.)

    `progress`: None is a bar on a terminal and in a notebook, True and False are always and never,
    and a function is called with the bytes of each weight that was moved.

    On a distributed module this is `redistribute`: options that are not given stay as they were.
    All or nothing: SpecError, PlacementError, FetchError leave the module as it was.
    """
    check_module(module)
    check_progress(progress)
    check_one_placement(spec, plan, virtual_vram, donor)
    distributed = distribution.is_distributed(module)
    before = distribution.distribution_of(module) if distributed else None
    opts = Options.of(options, _ARGUMENTS, before.lasting_options() if before else None)
    groups = distribution.group_members(module)
    inventory = distribution.inventory_of(module, groups)
    if plan is not None:
        planning.check_plan_fits(plan, inventory)
        opts = opts.as_planned(plan, options)
    else:
        devices = planning.devices_for(groups, module)
        plan = planning.plan_inventory(
            inventory, spec, opts, devices, virtual_vram=virtual_vram, donor=donor
        )
    distribution.check_has_values(module, plan.compute)
    if problem := plan.over_budget():
        warn_at_caller(problem)
    origins = before.origins if before else {}
    return distribution.place(module, plan, opts, groups, origins, progress=progress)


def redistribute(
    module: Module,
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    progress: Progress = None,
    **options: Unpack[PlacementOptions],
) -> Module:
    """A new placement of a distributed module, without loading it again.

    Arguments are those of `distribute`; options that are not given stay as they were. Other threads
    that call the module wait for a moment, at their next call of a part of it. Raises as
    `distribute`, and PlacementError on a module that is not distributed, or if such a thread does
    not come to rest for a minute.
    """
    distribution.distribution_of(module)
    return distribute(
        module,
        spec,
        plan=plan,
        virtual_vram=virtual_vram,
        donor=donor,
        progress=progress,
        **options,
    )


def undistribute(module: Module, device: str | torch.device | None = None) -> Module:
    """A plain module again, on its compute device or on `device`. All or nothing.

    Other threads that call the module wait for a moment. PlacementError if it is not distributed,
    or if such a thread does not come to rest for a minute.
    """
    check_module(module)
    return distribution.unplace(module, device)
