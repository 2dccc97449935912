# SPDX-License-Identifier: Apache-2.0
"""How long a step will take with some placement, by a rehearsal of the engine's own ring."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from distorch import _native
from distorch.errors import PlacementError, SpecError
from distorch.loading import plan as plan_of
from distorch.planner import Plan
from distorch.prediction.predicted import LinkUse, Prediction
from distorch.prediction.script import Script, script_of
from distorch.prediction.step import Step
from distorch.runtime.changes import alone
from distorch.runtime.distribution import distribution_of, known_distribution
from distorch.runtime.groups import Group, group_members, shape_of
from distorch.runtime.links import known_links
from distorch.runtime.options import Options, PlacementOptions, check_module
from distorch.runtime.ring_room import ring_bytes
from distorch.timeline import Span, Timeline
from distorch.tracing import is_tracing

_LINKS = ("copies", "reads")  # the first words of tracks
_COMPUTING = ("compute", "decodes")


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
        PlacementError: The placement cannot be done, a link was never measured, the step is of
            another model or another device, or a trace is running.
    """
    check_module(module)
    if not isinstance(step, Step):
        raise SpecError(
            f"predict: expected a step from distorch.record_step, got a {type(step).__name__}"
        )
    if is_tracing():
        raise PlacementError("a trace is running: predict when its block has ended")
    measured = known_links()
    if measured is None:
        raise PlacementError(
            "the links of this machine were not measured: call distorch.calibrate() once"
        )
    state = known_distribution(module)
    before = state.lasting_options() if state is not None else None
    opts = Options.of(options, ("spec", "plan", "virtual_vram", "donor"), before)
    given = [spec, plan, virtual_vram]
    if not options and all(one is None for one in given):
        chosen = distribution_of(module).plan
    elif plan is not None:
        chosen, opts = plan, opts.as_planned(plan, options)
    else:
        chosen = plan_of(module, spec, virtual_vram=virtual_vram, donor=donor, **options)
    with alone(module, nested=True):  # not in the middle of a change
        groups = group_members(module)
        _check_step(step, groups, chosen)
        # Models on one device share a ring, and the largest reservation counts.
        own = state.reservation if state is not None else None
        ring = max(ring_bytes(groups, chosen, opts), _native.reserved_beside(chosen.compute, own))
        script = script_of(groups, chosen, step, ring, measured)
    return _rehearsed(script, chosen)


def _check_step(step: Step, groups: list[Group], plan: Plan) -> None:
    if not step.uses:
        raise PlacementError(
            "the step is empty: run the model inside of the block of distorch.record_step"
        )
    shapes = {group.name: shape_of(group.first) for group in groups}
    for name, shape in step.shapes.items():
        if shapes.get(name) != shape:
            there = f"has it as {list(shapes[name])}" if name in shapes else "does not have it"
            raise PlacementError(
                f"the step uses {name!r} {list(shape)}, and this model {there}; record a step of "
                "this model with distorch.record_step"
            )
    if step.compute != plan.compute:
        raise PlacementError(
            f"the step was recorded on {step.compute!r}, and the placement computes on "
            f"{plan.compute!r}; record one there"
        )


def _rehearsed(script: Script, plan: Plan) -> Prediction:
    found = _native.rehearse(**script.arguments())
    stalls: dict[str, float] = {}
    for weight, waited in zip(script.weights, found["stalls"], strict=True):
        if waited > 0:
            stalls[weight.name] = stalls.get(weight.name, 0.0) + waited
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
        stalls=stalls,
        links=links,
        ring_bytes=script.ring_bytes,
        overflows=found["overflows"],
        timeline=Timeline([Span(*span) for span in found["spans"]]),
    )
