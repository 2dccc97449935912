# SPDX-License-Identifier: Apache-2.0
"""plan: what `distribute` and `load` would do."""

from __future__ import annotations

import os
from dataclasses import replace

from torch import nn
from typing_extensions import Unpack

from distorch.errors import SpecError, warn_at_caller
from distorch.formats.checkpoint import open_checkpoint
from distorch.loading.prepare import OF_LOAD, LoadOptions, Request, prepare, ties_kept
from distorch.machine.profiles import Machine, machine_of
from distorch.machine.supposed import supposing
from distorch.planner import Plan
from distorch.rehearsal import arrangement
from distorch.runtime import distribution, planning
from distorch.runtime.changes import alone
from distorch.runtime.groups import Group, group_members
from distorch.runtime.options import check_module

_ARGUMENTS = ("spec", "module", "virtual_vram", "donor", "machine", *OF_LOAD)


def plan(
    source: nn.Module | str | os.PathLike[str],
    spec: str | None = None,
    *,
    module: nn.Module | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    machine: Machine | str | os.PathLike[str] | None = None,
    **options: Unpack[LoadOptions],
) -> Plan:
    """Says where every weight would go. Nothing moves.

    Args:
        source: A module: the plan is what `distribute` does (`redistribute`, if it is distributed).
            Or a checkpoint. Without `module=` only the file's names, bytes and order are known.
            That says how much goes where to within a few tensors.
        spec: A placement string, such as "cuda:0,2.5gb;cpu,*".
        module: The module that the checkpoint will fill: the plan is then exactly what
            `load(module, source, ...)` does.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        machine: Another machine than this one: a `Machine`, its name ("rtx3090-pcie4x16-64gb"), or
            the path of its file.
        options: Those of `distribute`, and with `module=` those of `load`, too.

    Returns:
        The plan: `.bytes`, `.placement`, `.save(path)`. It prints as a table.

    Raises:
        SpecError: The spec or an option is wrong.
        PlacementError: The placement cannot be done.
        FormatError: The file is missing, damaged, or does not fit the module; or that of the
            machine is.
    """
    with supposing(machine_of(machine)):
        return _plan(source, spec, module, virtual_vram, donor, options)


def _plan(  # noqa: PLR0917
    source: nn.Module | str | os.PathLike[str],
    spec: str | None,
    module: nn.Module | None,
    virtual_vram: str | int | None,
    donor: str | None,
    options: LoadOptions,
) -> Plan:
    request = Request.of(spec, virtual_vram, donor, options, _ARGUMENTS)
    request.verifies()  # says what is wrong with it; a plan reads no weights
    request = replace(request, verify=False)
    if module is not None:
        if isinstance(source, nn.Module):
            raise SpecError(
                "module= goes with a checkpoint file, and the first argument is a module"
            )
        check_module(module)
        with ties_kept(module, after_error=False):  # nothing moves
            return prepare(module, source, request).plan
    if given := [name for name in OF_LOAD if name in options]:
        raise SpecError(
            f"{given[0]}= is an option of load: the plan depends on the module that the checkpoint "
            "fills. Give plan(FILE, spec, module=model, ...)"
        )
    before = None
    groups: list[Group] | None = None
    reservation = None
    if isinstance(source, nn.Module):
        with alone(source, nested=True):  # not in the middle of a change
            groups = group_members(source)
            inventory = distribution.inventory_now(source, groups)
            devices = planning.devices_for(groups, source)
            if distribution.is_distributed(source):
                state = distribution.distribution_of(source)
                before, reservation = state.lasting_options(), state.reservation
    else:
        if not isinstance(source, str | os.PathLike):
            kind = source.__name__ if isinstance(source, type) else type(source).__name__
            raise SpecError(
                f"plan: expected a module or the path of a checkpoint, got {kind}; of a pipeline, "
                "give one of its parts, such as pipe.transformer"
            )
        inventory = open_checkpoint(source).inventory()
        devices = planning.devices_for((), None)
    chosen = request.options(before)
    found = planning.plan_inventory(
        inventory, spec, chosen, devices, virtual_vram=virtual_vram, donor=donor,
        arrange=arrangement(chosen, groups, reservation),
    )  # fmt: skip
    if problem := found.over_budget():
        warn_at_caller(problem)
    return found
