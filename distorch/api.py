"""The functions that users call on a module."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import nn

from distorch.errors import SpecError
from distorch.formats.checkpoint import open_checkpoint
from distorch.planner import Plan
from distorch.runtime import distribution
from distorch.runtime.options import Options

Module = TypeVar("Module", bound=nn.Module)


def plan(
    source: nn.Module | str | os.PathLike[str],
    spec: str | None = None,
    *,
    virtual_vram: str | int | None = None,
    donor: str = "cpu",
    **options: Any,
) -> Plan:
    """A dry run: where every weight of a module or of a checkpoint file would go. Nothing moves.

    Options are those of `distribute`. Raises SpecError, PlacementError, FormatError.
    """
    opts = Options(**options)
    if isinstance(source, nn.Module):
        groups = distribution.group_members(source)
        inventory = distribution.inventory_of(source, groups)
        devices = distribution.devices_for(groups, source)
    else:
        inventory = open_checkpoint(source, quantised=True).inventory()
        devices = distribution.devices_for((), None)
    return distribution.plan_inventory(
        inventory, spec, opts, devices, virtual_vram=virtual_vram, donor=donor
    )


def distribute(
    module: Module,
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    virtual_vram: str | int | None = None,
    donor: str = "cpu",
    progress: distribution.Progress | None = None,
    **options: Any,
) -> Module:
    """Places a module's weights as the spec (or a saved plan) says; returns the same module.

    Options: `compute` device; `order` "interleaved" | "sequential"; `min_bytes` (smaller and 1-D
    tensors stay resident, 0: every floating parameter may leave); `keep` / `offload` name patterns
    (what is kept stays resident like small tensors do, even beyond the compute device's share:
    `plan.floor` says how much that is);
    `rules` [(pattern, device)]; `prefetch` bytes of look-ahead ("auto", 0 = none); `compress`
    "auto" | "never". `progress` is called with the bytes of each weight that was moved. On a
    distributed module this is `redistribute`.
    All or nothing: SpecError, PlacementError, FetchError leave the module as it was.
    """
    opts = Options(**options)
    groups = distribution.group_members(module)
    inventory = distribution.inventory_of(module, groups)
    if plan is not None:
        if spec is not None or virtual_vram is not None:
            raise SpecError("give a placement, virtual_vram= or plan=, not several of them")
        opts.check()
        distribution.check_plan_fits(plan, inventory)
    else:
        devices = distribution.devices_for(groups, module)
        plan = distribution.plan_inventory(
            inventory, spec, opts, devices, virtual_vram=virtual_vram, donor=donor
        )
    distribution.check_has_values(module, plan.compute)
    origins = {}
    if distribution.is_distributed(module):
        origins = distribution.distribution_of(module).origins
    return distribution.place(module, plan, opts, groups, origins, progress=progress)


def redistribute(
    module: Module, spec: str | None = None, *, plan: Plan | None = None, **options: Any
) -> Module:
    """A new placement of a distributed module, without loading it again.

    Options that are not given stay as they were. Other threads that call the module wait for a
    moment, at their next call of a part of it. Raises as `distribute`, and PlacementError on a
    module that is not distributed, or if such a thread does not come to rest for a minute.
    """
    before = distribution.distribution_of(module)
    kept = {
        name: value
        for name, value in vars(before.options).items()
        if name not in options and not (name == "compute" and value is None)
    }
    kept.setdefault("compute", options.get("compute", before.plan.compute))
    return distribute(module, spec, plan=plan, **{**kept, **options})


def undistribute(module: Module, device: str | torch.device | None = None) -> Module:
    """A plain module again, on its compute device or on `device`. All or nothing.

    Other threads that call the module wait for a moment. PlacementError if it is not distributed,
    or if such a thread does not come to rest for a minute.
    """
    return distribution.unplace(module, device)
