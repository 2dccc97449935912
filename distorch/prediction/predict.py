# SPDX-License-Identifier: Apache-2.0
"""How long a step will take with some placement, by a rehearsal of the engine's own ring."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn
from typing_extensions import Unpack

from distorch import _native
from distorch.errors import SpecError, warn_at_caller
from distorch.machine.links import measured_links
from distorch.machine.profiles import Machine, machine_of
from distorch.machine.rates import Rates
from distorch.machine.supposed import supposing
from distorch.planner import Arrange, Freedom, Plan, PlanFor
from distorch.prediction.predicted import LinkUse, Prediction
from distorch.rehearsal import (
    Problem,
    Script,
    arrangement,
    check_step_fits,
    encoded_in,
    problem_of,
    rows_of,
    script_of,
)
from distorch.runtime.changes import alone
from distorch.runtime.distribution import distribution_of, inventory_now, known_distribution
from distorch.runtime.groups import group_members
from distorch.runtime.options import Options, OptionsOfStep, check_module, check_one_placement
from distorch.runtime.planning import check_plan_fits, devices_for, plan_inventory
from distorch.runtime.ring_room import look_ahead_bytes, reserved_beside, ring_bytes
from distorch.step import Step
from distorch.timeline import Span, Timeline

_LINKS = ("copies", "reads")  # the first words of tracks
_COMPUTING = ("compute", "decodes")
_ARGUMENTS = ("spec", "plan", "virtual_vram", "donor", "machine")


def predict(
    module: nn.Module,
    step: Step,
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    machine: Machine | str | os.PathLike[str] | None = None,
    **options: Unpack[OptionsOfStep],
) -> Prediction:
    """Says how long a step would take with a placement. Nothing moves.

    The engine's look-ahead is run with numbers in place of bytes, against the measured rates of the
    links (`calibrate`). So the prediction knows what the ring keeps, and when each copy can begin.

    Args:
        module: A module. It need not be distributed if a placement is given.
        step: What a step of this module does, from `record_step` or `Step.load`.
        spec: A placement string, such as "cuda:0,2.5gb;cpu,*". If neither this nor `plan` nor
            `virtual_vram` is given: as the module is placed now.
        plan: A plan, in place of a spec.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        machine: Another machine than this one: a `Machine`, its name ("rtx3090-pcie4x16-64gb"), or
            the path of its file. The times of operators are those of the step (`estimate_step`).
        options: Those of `distribute`. Those that are not given are as they are now.

    Returns:
        A `Prediction`.

    Raises:
        SpecError: The spec or an option is wrong.
        FormatError: The file of the machine is damaged.
        PlacementError: The placement cannot be done, a link was never measured, or the step is of
            another model, another device or another machine.
    """
    check_module(module)
    if not isinstance(step, Step):
        raise SpecError(
            "predict: expected a step, from `with distorch.record_step(model) as step:` or from "
            f"distorch.Step.load(path), got {type(step).__name__}"
        )
    step.check()
    placed_now = spec is None and plan is None and virtual_vram is None and donor is None
    if not placed_now:
        check_one_placement(spec, plan, virtual_vram, donor)
    there = machine_of(machine)
    if there is not None and placed_now:
        raise SpecError(
            "machine= needs a placement on that machine, such as spec='cuda:0,4gb;cpu,*'"
        )
    with supposing(there), alone(module, nested=True):  # not in the middle of a change
        measured = measured_links()
        state = distribution_of(module) if placed_now else known_distribution(module)
        before = state.lasting_options() if state is not None else None
        opts = Options.of({**options, "step": step}, _ARGUMENTS, before)
        groups = group_members(module)
        inventory = inventory_now(module, groups)
        reservation = state.reservation if state else None
        noted = _Noted(arrangement(opts, groups, reservation))
        if placed_now:
            plan = distribution_of(module).plan
            opts = opts.as_planned(plan, options)
        elif plan is not None:
            check_plan_fits(plan, inventory)
            opts = opts.as_planned(plan, options)
        else:
            devices = devices_for(groups, module)
            plan = plan_inventory(
                inventory, spec, opts, devices,
                virtual_vram=virtual_vram, donor=donor, arrange=noted,
            )  # fmt: skip
            if problem := plan.over_budget():
                warn_at_caller(problem)
        check_step_fits(step, groups, plan.compute)
        # Models on one device share a ring, and the largest reservation counts.
        others = reserved_beside(plan.compute, reservation)
        ring = max(ring_bytes(groups, plan, opts), others)
        script = script_of(groups, plan, step, ring, measured)
        freedom = noted.freedom or Freedom.within(plan, inventory)
        rates = Rates(plan.compute, measured)
        most = max(ring, _largest_ring(freedom, step, opts))
        # With some ring only rows of a table travel, so the bound counts no more.
        in_part = encoded_in(groups) | rows_of(step).keys()
        alternatives = problem_of(freedom, step, rates, most, encoded=in_part, measured=False)
    return _rehearsed(script, plan, alternatives)


def _largest_ring(freedom: Freedom, step: Step, options: Options) -> int:
    """Bytes that a ring of any placement may have. Its size depends on what travels."""
    everything = {weight.name: weight.nbytes for weight in freedom.weights}
    return look_ahead_bytes(everything, rows_of(step).keys(), options.prefetch)


class _Noted:
    """An `Arrange` that notes what could be decided."""

    def __init__(self, decide: Arrange | None) -> None:
        self._decide = decide
        self.freedom: Freedom | None = None

    def __call__(self, freedom: Freedom, plan_for: PlanFor) -> Mapping[str, str]:
        self.freedom = freedom
        return self._decide(freedom, plan_for) if self._decide else freedom.placement


def _rehearsed(script: Script, plan: Plan, alternatives: Problem) -> Prediction:
    found = _native.rehearse(**script.arguments())
    computing = _native.rehearse(**script.resident().arguments())["step"]
    bound = found["step"] if alternatives.is_decided else alternatives.bound()
    if not alternatives.looks_up:  # the host's time counts, too
        bound = max(bound, computing)
    links, device = {}, 0.0
    for track, (nbytes, busy) in found["traffic"].items():
        kind = track.split(" ", maxsplit=1)[0]
        if kind in _LINKS:
            links[track.removeprefix("copies ").replace("reads", "disk")] = LinkUse(
                round(nbytes), busy
            )
        elif kind in _COMPUTING:
            device += busy
    return Prediction(
        plan=plan,
        seconds=found["step"],
        waited_seconds=found["waited"],
        first_seconds=found["first"],
        compute_seconds=computing,
        bound_seconds=bound,
        busy_seconds=min(device, found["step"]),
        stalls={name: seconds for name, seconds in found["stalls"].items() if seconds > 0},
        links=links,
        ring_bytes=script.ring_bytes,
        overflows=found["overflows"],
        timeline=Timeline([Span(*span) for span in found["spans"]]),
    )
