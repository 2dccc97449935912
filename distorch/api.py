# SPDX-License-Identifier: Apache-2.0
"""The functions that users call on a module that exists."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from distorch.display.progress import Progress, check_progress
from distorch.errors import warn_at_caller
from distorch.planner import Plan
from distorch.rehearsal import arrangement
from distorch.runtime import distribution, placing, planning
from distorch.runtime.changes import alone
from distorch.runtime.groups import group_members
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
    """Places a module's weights, and returns the same module.

    Exactly one of `spec`, `plan` and `virtual_vram` says where they go. Buffers, and weights that
    are small or named by `keep`, stay on the compute device even if they are more than its share.
    Then there is a PlacementWarning, and `report` is not `ok`. (A share of 0 asks for no more than
    this.)

    On a module that is distributed already this is `redistribute`: options that are not given stay
    as they were.

    Args:
        module: Any `torch.nn.Module` whose weights have values.
        spec: A placement string, such as "cuda:0,2.5gb;cpu,*", or "auto".
        plan: A `Plan`: from `distorch.plan`, or from `Plan.load(path)`.
        virtual_vram: Bytes to give away, as a number or as "4gb".
        donor: Where the bytes of `virtual_vram` go: one device, or several in their order
            ("cuda:1,cpu"). If not given: "cpu", or "disk" where the CPU computes.
        progress: None shows a bar on a terminal and in a notebook; elsewhere, a line to stderr
            every five seconds. True and False: always and never. A function is called with the
            bytes of each weight that was moved.
        compute: The device that runs the model. If not given: the first accelerator of the spec,
            else the first one of this machine, else "cpu".
        order: "interleaved" spreads the weights that leave evenly over a step. "sequential" gives
            the first bytes of the model to the first entry. "optimal" looks for the placement
            within the same shares whose step is predicted to be the shortest. It needs `step`.
        step: A `Step` from `record_step`: how long operators take. Only for order="optimal".
        min_bytes: Tensors with fewer bytes, and 1-D ones, stay resident (1 MiB). With 0, every
            floating or quantised parameter may leave. With "auto", as many as needed leave, the
            largest first, where the compute device's share is too small for what would stay.
        keep: Name patterns of weights that stay on the compute device, such as `["*.norm*"]`.
        offload: Name patterns of weights that must leave it.
        rules: Pairs of a name pattern and a device of the spec. The first pattern that matches
            decides, also against `keep`, `offload` and `min_bytes`.
        prefetch: Bytes of look-ahead on the compute device, beyond its share. "auto" is 128 MiB,
            or the two largest weights that are fetched whole, and never more than what is fetched.
            0 is none.
        compress: "auto" or "never". Weights are sent as they are.

    Returns:
        The module itself.

    Raises:
        SpecError: The spec or an option is wrong.
        PlacementError: It cannot be done with this module on this machine, or another thread that
            calls the module does not come to rest within a minute.
        FetchError: A donor failed.

    After any of them the module is as it was.
    """
    check_module(module)
    check_progress(progress)
    check_one_placement(spec, plan, virtual_vram, donor)
    with alone(module), distribution.nothing_merging(module):
        distributed = distribution.is_distributed(module)
        before = distribution.distribution_of(module) if distributed else None
        opts = Options.of(options, _ARGUMENTS, before.lasting_options() if before else None)
        groups = group_members(module)
        inventory = distribution.inventory_now(module, groups)
        if plan is not None:
            planning.check_plan_fits(plan, inventory)
            opts = opts.as_planned(plan, options)
        else:
            devices = planning.devices_for(groups, module)
            plan = planning.plan_inventory(
                inventory, spec, opts, devices, virtual_vram=virtual_vram, donor=donor,
                arrange=arrangement(opts, groups, before.reservation if before else None),
            )  # fmt: skip
        placing.check_has_values(module, plan.compute)
        if problem := plan.over_budget():
            warn_at_caller(problem)
        origins = before.origins if before else {}
        return placing.place(module, plan, opts, groups, origins, progress=progress)


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
    """Places a distributed module anew, without loading it again.

    Exactly one of `spec`, `plan` and `virtual_vram` says where the weights go. Other threads that
    call the module wait meanwhile, at their next call of a part of it.

    Args:
        module: A distributed module.
        spec: A placement string, such as "cuda:0,2.5gb;cpu,*".
        plan: A plan, in place of a spec.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        progress: As in `distribute`.
        options: Those of `distribute`. Those that are not given stay as they were.

    Returns:
        The module itself.

    Raises:
        SpecError: The spec or an option is wrong.
        PlacementError: The module is not distributed, the placement cannot be done, or another
            thread does not come to rest within a minute.
        FetchError: A donor failed.

    After any of them the module is as it was.
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
    """Makes a distributed module a plain one again.

    Other threads that call the module wait meanwhile.

    Args:
        module: A distributed module.
        device: Where its weights go. If not given: its compute device.

    Returns:
        The module itself.

    Raises:
        SpecError: `device` is no device that computes.
        PlacementError: The module is not distributed, or another thread does not come to rest
            within a minute.
        FetchError: A donor failed.

    After any of them the module is as it was.
    """
    check_module(module)
    return placing.unplace(module, device)
