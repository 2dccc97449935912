# SPDX-License-Identifier: Apache-2.0
"""`order="optimal"`: which weights stay, and where each other one lies, so that a step is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distorch import _donors, _native
from distorch.errors import PlacementError, SpecError
from distorch.machine.links import measured_links
from distorch.machine.rates import Rates
from distorch.planner import Freedom, Plan, PlanFor, WeightInfo
from distorch.rehearsal.script import check_step_fits, script_of, takes_rows
from distorch.runtime.groups import Group
from distorch.runtime.options import Options
from distorch.runtime.ring_room import look_ahead_bytes, ring_bytes
from distorch.step import Step

# Placements that are rehearsed: fewer of models with many uses, so that it takes half a second.
_USES = 2500
_FEWEST, _MOST = 2, 250
_WHOLLY = 4  # of them, by whole rehearsals
_CLOSE = 1.001  # to the bound: no other placement is worth a rehearsal
_BOUNDLESS = 1e18  # bytes per second
_WHOLE = 1 << 30  # bytes that are cut to see what part each donor of a stripe gets


@dataclass(frozen=True)
class Problem:
    """Arguments of `_native.find_placements` and `_native.step_bound`; see csrc/placement."""

    links: list[tuple[float, float]]
    together: float
    tiers: list[tuple[int, list[tuple[int, float]]]]
    weights: list[tuple[int, int, int]]
    uses: list[tuple[float, list[int]]]
    ring_bytes: int
    looks_up: bool  # rows of tables that may lie on a donor

    def arguments(self) -> dict[str, Any]:
        """By name."""
        return {name: value for name, value in vars(self).items() if name != "looks_up"}

    def bound(self) -> float:
        """Seconds of a step that no placement beats, without what the host needs to issue it."""
        return _native.step_bound(**self.arguments())

    @property
    def is_decided(self) -> bool:
        """Whether there is one placement only."""
        for nbytes, _, allowed in self.weights:
            room = [cap >= nbytes for cap, _ in self.tiers]
            if sum(fits for tier, fits in enumerate(room) if allowed >> tier & 1) > 1:
                return False
        return True


def problem_of(
    freedom: Freedom, step: Step, rates: Rates, ring: int, *, measured: bool = True
) -> Problem:
    """What may be decided, as numbers. `ring`: its bytes. PlacementError if a link was not
    `measured`; if that does not matter, such a link takes no time.
    """
    compute = next(iter(freedom.rooms))
    places = _places_of(freedom)
    known = [*freedom.free, *freedom.leaving, *(weight for weight, _ in freedom.ruled)]
    index = {weight.name: i for i, weight in enumerate(known)}
    looked_up = _rows_of(step)
    donors = [place for place in places if place != compute]
    links, found, together = _links(donors, rates, measured)
    capacity = {place: freedom.rooms.get(place, 0) for place in places}
    for weight, device in freedom.ruled:
        capacity[device] += weight.nbytes
    tiers = [(capacity[place], _routes(place, found, compute)) for place in places]
    everywhere = sum(1 << i for i, place in enumerate(places) if place in freedom.rooms)
    donors_only = everywhere & ~1
    used = set(step.weights)

    def row(weight: WeightInfo, allowed: int) -> tuple[int, int, int]:
        travels = weight.nbytes if weight.name in used else 0
        rows = looked_up.get(weight.name, 0)
        if rows and takes_rows(rows, weight.shape[0], whole=weight.nbytes <= ring):
            travels = rows * weight.nbytes // weight.shape[0]
        return weight.nbytes, travels, allowed

    weights = [
        *(row(weight, everywhere) for weight in freedom.free),
        *(row(weight, donors_only) for weight in freedom.leaving),
        *(row(weight, 1 << places.index(device)) for weight, device in freedom.ruled),
    ]
    uses = []
    for use in step.uses:
        seconds = rates.without_issuing(use.seconds, use.idle)
        if use.rows and use.weights and use.weights[0] in index:
            table = known[index[use.weights[0]]]
            # Rows that are looked up on a donor may be there earlier than in the step.
            nbytes = use.rows * table.nbytes // max(table.shape[0], 1)
            known_donors = [place for place in donors if rates.knows(place.split("+")[0])]
            seconds = min([seconds, *(rates.row_seconds(d, nbytes) for d in known_donors)])
        uses.append((seconds, [index[name] for name in use.weights if name in index]))
    return Problem(
        links, together, tiers, weights, uses, ring, bool(looked_up.keys() & index.keys())
    )


def _places_of(freedom: Freedom) -> list[str]:
    """The compute device, and the donors that may hold anything."""
    compute, *donors = freedom.rooms
    used = [place for place in donors if freedom.rooms[place] > 0]
    return list(dict.fromkeys([compute, *used, *(device for _, device in freedom.ruled)]))


def _rows_of(step: Step) -> dict[str, int]:
    """Weight -> rows that are looked up in it in one use, for tables."""
    found: dict[str, int] = {}
    for use in step.uses:
        if use.rows and use.weights:
            found[use.weights[0]] = max(use.rows, found.get(use.weights[0], 0))
    return found


def _links(
    donors: Sequence[str], rates: Rates, measured: bool
) -> tuple[list[tuple[float, float]], dict[str, int], float]:
    """(bytes per second, latency) of each link; place -> its link; bytes per second of all."""
    places = {place for donor in donors for place in donor.split("+")}
    if "disk" in places and rates.compute != "cpu":
        places.add("cpu")  # what was read goes on from host memory
    unknown = [] if measured else sorted(place for place in places if not rates.knows(place))
    places -= set(unknown)
    links, groups = rates.links_for(places)
    numbers = [(rate, latency) for _, rate, latency, _ in links]
    found = {place: i for i, (place, *_) in enumerate(links)}
    if "disk" in places:
        found["disk"] = len(numbers)
        numbers.append(rates.disk_for(places))
    for place in unknown:
        found[place] = len(numbers)
        numbers.append((_BOUNDLESS, 0.0))
    return numbers, found, groups[0] if groups else 0.0


def _routes(place: str, links: Mapping[str, int], compute: str) -> list[tuple[int, float]]:
    """(link, part of the bytes) for each link that a fetch from there takes."""
    if place == compute:
        return []
    parts = place.split("+")
    sizes = _donors.stripe_sizes(_WHOLE, parts, compute)
    routes = [(links[part], n / _WHOLE) for part, n in zip(parts, sizes, strict=True) if n]
    if "disk" in parts and compute != "cpu":  # what was read goes on from host memory
        routes += [(links["cpu"], share) for link, share in routes if link == links["disk"]]
    return routes


class Arrangement:
    """Finds the placement with the shortest step: an `Arrange` of the planner.

    The search is native code, and takes a step for a flow of bytes. The best placements that it
    finds are then rehearsed, and so is the even spread. The result is never worse than that.
    """

    def __init__(self, options: Options, groups: Sequence[Group] | None) -> None:
        if options.step is None:
            raise SpecError(
                "order='optimal' needs step=, which says how long operators take: record one with "
                "`with distorch.record_step(model) as step: model(x)`, or give another order="
            )
        self._step = options.step
        self._options = options
        self._groups = groups
        self._measured = measured_links()

    def __call__(self, freedom: Freedom, plan_for: PlanFor) -> Mapping[str, str]:
        """Name -> device. PlacementError if the step does not fit, or a link was not measured."""
        spread = plan_for(freedom.placement)
        if self._groups is not None:
            check_step_fits(self._step, self._groups, spread.compute)
        else:
            self._check_names(freedom, spread)
        rates = Rates(spread.compute, self._measured)
        problem = problem_of(freedom, self._step, rates, self._ring(freedom, spread))
        names = [w.name for w in (*freedom.free, *freedom.leaving)]
        ruled = [device for _, device in freedom.ruled]
        places = _places_of(freedom)
        start = [
            places.index(device) for device in (*(freedom.placement[n] for n in names), *ruled)
        ]
        most = max(_FEWEST, min(_MOST, _USES // max(len(problem.uses), 1)))
        found = [
            {name: places[tier] for name, tier in zip(names, tiers[: len(names)], strict=True)}
            for tiers in _native.find_placements(**problem.arguments(), start=start, most=most)
        ]
        if self._groups is None:
            return found[0]
        return self._shortest(freedom.placement, found, plan_for, problem)

    def _shortest(
        self,
        spread: Mapping[str, str],
        found: Sequence[Mapping[str, str]],
        plan_for: PlanFor,
        problem: Problem,
    ) -> Mapping[str, str]:
        """The one with the shortest step, by rehearsals: brief ones of many, and whole ones of the
        best, since some steps settle late.
        """
        enough = problem.bound() * _CLOSE
        ranked: list[tuple[float, int, Mapping[str, str]]] = []
        for placement in (spread, *found):
            seconds = self._seconds(plan_for(placement), brief=True)
            ranked.append((seconds, len(ranked), placement))
            if seconds <= enough:
                break
        ranked.sort(key=lambda entry: entry[:2])
        wholly = max(1, min(_WHOLLY, len(found) // _FEWEST))
        best = spread
        if ranked[0][2] == spread:
            return best
        least = self._seconds(plan_for(spread))
        for _, _, placement in ranked[:wholly]:
            seconds = self._seconds(plan_for(placement))
            if seconds < least:
                best, least = placement, seconds
        return best

    def _ring(self, freedom: Freedom, spread: Plan) -> int:
        """Bytes of the ring that an even spread has."""
        if self._groups is not None:
            return ring_bytes(self._groups, spread, self._options)
        weights = (*freedom.free, *freedom.leaving, *(weight for weight, _ in freedom.ruled))
        fetched = {
            weight.name: weight.nbytes
            for weight in weights
            if spread.placement[weight.name] != spread.compute
        }
        return look_ahead_bytes(fetched, _rows_of(self._step).keys(), self._options.prefetch)

    def _seconds(self, plan: Plan, *, brief: bool = False) -> float:
        assert self._groups is not None
        ring = ring_bytes(self._groups, plan, self._options)
        script = script_of(self._groups, plan, self._step, ring, self._measured)
        return float(_native.rehearse(**script.arguments(), waits=False, brief=brief)["step"])

    def _check_names(self, freedom: Freedom, plan: Plan) -> None:
        known = plan.placement
        absent = [name for name in self._step.weights if name not in known]
        if self._step.compute != plan.compute or absent:
            found = f"uses {absent[0]!r}, which is not there" if absent else "is of another device"
            raise PlacementError(
                f"step=: expected one of this model on {plan.compute!r}, found one on "
                f"{self._step.compute!r} that {found}; record it with distorch.record_step"
            )


def arrangement(options: Options, groups: Sequence[Group] | None = None) -> Arrangement | None:
    """What decides if `order` is "optimal"; None for other orders.

    `groups`: the weights as they are in memory. Without them, as while a file is loaded, placements
    are compared by the flow of bytes alone. Raises SpecError without a step, and PlacementError if
    the links were not measured.
    """
    return Arrangement(options, groups) if options.order == "optimal" else None
