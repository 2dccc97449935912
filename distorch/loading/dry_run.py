"""plan: what `distribute` and `load` would do."""

from __future__ import annotations

import os

from torch import nn
from typing_extensions import Unpack

from distorch.errors import SpecError
from distorch.formats.checkpoint import open_checkpoint
from distorch.loading.prepare import LoadOptions, Request, prepare
from distorch.planner import Plan
from distorch.runtime import distribution


def plan(
    source: nn.Module | str | os.PathLike[str],
    spec: str | None = None,
    *,
    module: nn.Module | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    **options: Unpack[LoadOptions],
) -> Plan:
    """A dry run: where every weight would go. Nothing moves.

    `source` is a module, and the plan is what `distribute` does (or `redistribute`, if it is
    distributed); options are its options. Or it is a checkpoint. With `module`, the plan is then
    what `load(module, source, ...)` does, and options are those of `load` (`dtype`, `resident`,
    `loras` and others). Without it, only the file is known: its names, its bytes, its order. That
    says how much goes where to within a few tensors, but a module may have other names, another
    order, other dtypes and further buffers.
    Raises SpecError, PlacementError, FormatError.
    """
    request = Request.of(spec, virtual_vram, donor, options)
    if module is not None:
        if isinstance(source, nn.Module):
            raise SpecError(
                "module= goes with a checkpoint file, and the first argument is a module"
            )
        return prepare(module, source, request).plan
    if request != Request(spec, None, virtual_vram, donor, request.placing):
        raise SpecError(
            "options of load (dtype=, resident=, loras= and others) change the plan for a "
            "checkpoint and the module that it fills: give plan(FILE, spec, module=model, ...)"
        )
    before = None
    if isinstance(source, nn.Module):
        groups = distribution.group_members(source)
        inventory = distribution.inventory_of(source, groups)
        devices = distribution.devices_for(groups, source)
        if distribution.is_distributed(source):
            before = distribution.distribution_of(source).lasting_options()
    else:
        inventory = open_checkpoint(source).inventory()
        devices = distribution.devices_for((), None)
    return distribution.plan_inventory(
        inventory, spec, request.options(before), devices, virtual_vram=virtual_vram, donor=donor
    )
