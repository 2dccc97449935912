# SPDX-License-Identifier: Apache-2.0
"""`order="optimal"`: which weights stay, and where each other one lies, so that a step is short."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from distorch import _native, _ops
from distorch.errors import PlacementError, SpecError
from distorch.machine.calibration import Calibration
from distorch.machine.links import measured_links
from distorch.machine.rates import Rates
from distorch.planner import Freedom, Plan, PlanFor, WeightInfo
from distorch.rehearsal.problem import MOST_TIERS, Problem, places_of, problem_of, rows_of
from distorch.rehearsal.script import (
    Script,
    check_step_fits,
    check_step_machine,
    script_of,
    script_of_sizes,
)
from distorch.runtime.groups import Group
from distorch.runtime.options import Options
from distorch.runtime.ring_room import look_ahead_bytes, reserved_beside, ring_bytes
from distorch.step import Step

# How many of the placements that were found are rehearsed: fewer if a step has many uses, so that
# all of them take about a second.
_USES_IN_ALL = 2500
_FEWEST_BRIEFLY, _MOST_BRIEFLY = 2, 250
_MOST_WHOLLY = 4
_CLOSE = 1.001  # to the bound: no other placement is worth a rehearsal


class _Weights(Protocol):
    """The weights that are placed, as far as they are known."""

    encoded: Collection[str]  # that are decoded when they are fetched

    def check(self, plan: Plan) -> None:
        """PlacementError unless the step is one of these weights on the device of the plan."""

    def ring(self, plan: Plan) -> int:
        """Bytes of look-ahead with a plan."""

    def script(self, plan: Plan, ring: int, measured: Calibration) -> Script:
        """The step with a plan."""


class _InMemory:
    """Weights of a module."""

    def __init__(self, groups: Sequence[Group], options: Options, step: Step) -> None:
        self._groups, self._options, self._step = groups, options, step
        self.encoded: Collection[str] = encoded_in(groups)

    def check(self, plan: Plan) -> None:
        try:
            check_step_fits(self._step, self._groups, plan.compute)
        except PlacementError as error:
            raise PlacementError(
                f"{error}, and give it as step=, or give another order= than 'optimal'"
            ) from error

    def ring(self, plan: Plan) -> int:
        return ring_bytes(self._groups, plan, self._options)

    def script(self, plan: Plan, ring: int, measured: Calibration) -> Script:
        return script_of(self._groups, plan, self._step, ring, measured)


class _OfFile:
    """Weights of which names and bytes are known."""

    encoded: Collection[str] = ()

    def __init__(self, weights: Sequence[WeightInfo], options: Options, step: Step) -> None:
        self._weights, self._options, self._step = weights, options, step

    def check(self, plan: Plan) -> None:
        check_step_machine(self._step)
        absent = [name for name in self._step.weights if name not in plan.placement]
        if self._step.compute == plan.compute and not absent:
            return
        found = f"uses {absent[0]!r}, which is not there" if absent else "is of another device"
        raise PlacementError(
            f"step=: expected one of this model on {plan.compute!r}, found one on "
            f"{self._step.compute!r} that {found}; record it with distorch.record_step"
        )

    def ring(self, plan: Plan) -> int:
        fetched = {
            weight.name: weight.nbytes
            for weight in self._weights
            if plan.placement[weight.name] != plan.compute
        }
        return look_ahead_bytes(fetched, rows_of(self._step).keys(), self._options.prefetch)

    def script(self, plan: Plan, ring: int, measured: Calibration) -> Script:
        return script_of_sizes(self._weights, plan, self._step, ring, measured)


class Arrangement:
    """Finds the placement with the shortest step: an `Arrange` of the planner.

    The search is native code, and takes a step for a flow of bytes. The best placements that it
    finds are then rehearsed, and so is the even spread. The result is never worse than that.
    """

    def __init__(
        self,
        options: Options,
        groups: Sequence[Group] | None,
        reservation: object | None,
    ) -> None:
        if options.step is None:
            raise SpecError(
                "order='optimal' needs step=, which says how long operators take: record one with "
                "`with distorch.record_step(model) as step: model(x)`, or give another order="
            )
        self._step = options.step
        self._options = options
        self._groups = groups
        self._reservation = reservation
        self._measured = measured_links()

    def __call__(self, freedom: Freedom, plan_for: PlanFor) -> Mapping[str, str]:
        """Name -> device. PlacementError if the step does not fit, or a link was not measured."""
        spread = plan_for(freedom.placement)
        weights: _Weights
        if self._groups is not None:
            weights = _InMemory(self._groups, self._options, self._step)
        else:
            weights = _OfFile(freedom.weights, self._options, self._step)
        weights.check(spread)
        rates = Rates(spread.compute, self._measured)
        ring = self._ring(weights, spread)
        problem = problem_of(freedom, self._step, rates, ring, encoded=weights.encoded)
        if len(problem.tiers) > MOST_TIERS:
            raise PlacementError(
                "order='optimal' is for at most 32 places, and this placement has "
                f"{len(problem.tiers)}; give another order="
            )
        names = [w.name for w in (*freedom.free, *freedom.leaving)]
        places = places_of(freedom)
        devices = [*(freedom.placement[n] for n in names), *(d for _, d in freedom.ruled)]
        start = [places.index(device) for device in devices]
        uses = max(len(problem.uses), 1)
        most = max(_FEWEST_BRIEFLY, min(_MOST_BRIEFLY, _USES_IN_ALL // uses))
        found = [
            {name: places[tier] for name, tier in zip(names, tiers[: len(names)], strict=True)}
            for tiers in _native.find_placements(**problem.arguments(), start=start, most=most)
        ]

        def seconds(placement: Mapping[str, str], *, brief: bool) -> float | None:
            try:
                plan = plan_for(placement)
            except PlacementError:  # two entries share memory, and together it is too little
                return None
            script = weights.script(plan, self._ring(weights, plan), self._measured)
            played = _native.rehearse(**script.arguments(), waits=False, brief=brief)
            return float(f"{played['step']:.9g}")  # equal ones are to be equal

        return _shortest(freedom.placement, found, problem, seconds)

    def _ring(self, weights: _Weights, plan: Plan) -> int:
        """As `predict` has it: models on one device share a ring, and the largest one counts."""
        others = reserved_beside(plan.compute, self._reservation)
        return max(weights.ring(plan), others)


class _Rehearse(Protocol):
    def __call__(self, placement: Mapping[str, str], *, brief: bool) -> float | None:
        """Seconds of a step; None if the placement cannot be done."""


def _shortest(
    spread: Mapping[str, str],
    found: Sequence[Mapping[str, str]],
    problem: Problem,
    rehearse: _Rehearse,
) -> Mapping[str, str]:
    """The placement with the shortest step, by rehearsals: brief ones of many, and whole ones of
    the best, since some steps settle late.
    """
    enough = problem.bound() * _CLOSE
    ranked: list[tuple[float, int, Mapping[str, str]]] = []
    for placement in (spread, *found):
        seconds = rehearse(placement, brief=True)
        if seconds is None:
            continue
        ranked.append((seconds, len(ranked), placement))
        if seconds <= enough:
            break
    ranked.sort(key=lambda entry: entry[:2])
    best = spread
    if ranked[0][2] == spread:
        return best
    least = rehearse(spread, brief=False)
    assert least is not None
    for _, _, placement in ranked[: max(1, min(_MOST_WHOLLY, len(found) // _FEWEST_BRIEFLY))]:
        seconds = rehearse(placement, brief=False)
        if seconds is not None and seconds < least:
            best, least = placement, seconds
    return best


def encoded_in(groups: Sequence[Group]) -> set[str]:
    """Names of weights that are decoded when they are fetched."""
    return {
        group.name
        for group in groups
        if _ops.is_sharded(group.first) and _ops.state(group.first).decoded
    }


def arrangement(
    options: Options,
    groups: Sequence[Group] | None = None,
    reservation: object | None = None,
) -> Arrangement | None:
    """What decides if `order` is "optimal"; None for other orders.

    `groups`: the weights as they are in memory. Without them, as while a file is loaded, only their
    bytes are known, and nothing is decoded. `reservation`: what the module has of a ring now.
    Raises SpecError without a step, and PlacementError if the links were not measured.
    """
    if options.order != "optimal":
        return None
    return Arrangement(options, groups, reservation)
