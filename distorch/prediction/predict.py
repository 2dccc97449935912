# SPDX-License-Identifier: Apache-2.0
"""How long a step will take with some placement, by a rehearsal of the engine's own ring."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from distorch import _native
from distorch.errors import PlacementError, SpecError
from distorch.loading import plan as plan_of
from distorch.machine.links import known_links
from distorch.planner import Plan
from distorch.prediction.predicted import LinkUse, Prediction
from distorch.prediction.recording import form_of
from distorch.prediction.script import Script, script_of
from distorch.runtime.changes import alone
from distorch.runtime.distribution import distribution_of, inventory_now, known_distribution
from distorch.runtime.groups import Group, group_members
from distorch.runtime.options import Options, PlacementOptions, check_module, check_one_placement
from distorch.runtime.planning import check_plan_fits
from distorch.runtime.ring_room import ring_bytes
from distorch.step import Step
from distorch.timeline import Span, Timeline

_LINKS = ("copies", "reads")  # the first words of tracks
_COMPUTING = ("compute", "decodes")
_ARGUMENTS = ("spec", "plan", "virtual_vram", "donor")


def predict(
    module: nn.Module,
    step: Step,
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    **options: Unpack[PlacementOptions],
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
        options: Those of `distribute`. Those that are not given are as they are now.

    Returns:
        A `Prediction`.

    Raises:
        SpecError: The spec or an option is wrong.
        PlacementError: The placement cannot be done, a link was never measured, or the step is of
            another model or another device.
    """
    check_module(module)
    if not isinstance(step, Step):
        raise SpecError(
            "predict: expected a step, from `with distorch.record_step(model) as step:` or from "
            f"distorch.Step.load(path), got {type(step).__name__}"
        )
    step.check()
    measured = known_links()
    if measured is None:
        raise PlacementError(
            "the links of this machine were not measured: call distorch.calibrate() once"
        )
    placed_now = spec is None and plan is None and virtual_vram is None and donor is None
    if not placed_now:
        check_one_placement(spec, plan, virtual_vram, donor)
    with alone(module, nested=True):  # not in the middle of a change
        state = distribution_of(module) if placed_now else known_distribution(module)
        before = state.lasting_options() if state is not None else None
        opts = Options.of(options, _ARGUMENTS, before)
        groups = group_members(module)
        if placed_now:
            plan = distribution_of(module).plan
            opts = opts.as_planned(plan, options)
        elif plan is not None:
            check_plan_fits(plan, inventory_now(module, groups))
            opts = opts.as_planned(plan, options)
        else:
            plan = plan_of(module, spec, virtual_vram=virtual_vram, donor=donor, **options)
        _check_fits(step, groups, plan)
        # Models on one device share a ring, and the largest reservation counts.
        others = _native.reserved_beside(plan.compute, state.reservation if state else None)
        ring = max(ring_bytes(groups, plan, opts), others)
        script = script_of(groups, plan, step, ring, measured)
    return _rehearsed(script, plan)


def _check_fits(step: Step, groups: list[Group], plan: Plan) -> None:
    if not step.uses:
        raise PlacementError(
            "the step is empty: run the model inside of the block of distorch.record_step, in the "
            "same thread"
        )
    forms = {group.name: form_of(group.first) for group in groups}
    for name, form in step.forms.items():
        if forms.get(name) != form:
            there = f"has it as {forms[name]}" if name in forms else "does not have it"
            raise PlacementError(
                f"the step uses {name!r} ({form}), and this model {there}; record a step of this "
                "model with distorch.record_step"
            )
    if step.compute != plan.compute:
        raise PlacementError(
            f"the step was recorded on {step.compute!r}, and the placement computes on "
            f"{plan.compute!r}; record one there"
        )


def _rehearsed(script: Script, plan: Plan) -> Prediction:
    found = _native.rehearse(**script.arguments())
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
        compute_seconds=_native.rehearse(**script.resident().arguments())["step"],
        busy_seconds=min(device, found["step"]),
        stalls={name: seconds for name, seconds in found["stalls"].items() if seconds > 0},
        links=links,
        ring_bytes=script.ring_bytes,
        overflows=found["overflows"],
        timeline=Timeline([Span(*span) for span in found["spans"]]),
    )
