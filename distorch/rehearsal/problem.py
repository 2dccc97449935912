# SPDX-License-Identifier: Apache-2.0
"""What `order="optimal"` may decide, and what it knows, as numbers for csrc/placement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distorch import _donors, _native
from distorch.machine.rates import Rates
from distorch.planner import Freedom, WeightInfo
from distorch.rehearsal.script import takes_rows
from distorch.step import Step

MOST_TIERS = 32  # see csrc/bindings/placement.cpp
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
        if len(self.tiers) > MOST_TIERS:
            return 0.0
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
    freedom: Freedom,
    step: Step,
    rates: Rates,
    ring: int,
    *,
    encoded: Collection[str],
    measured: bool = True,
) -> Problem:
    """What may be decided, as numbers. `ring`: its bytes. `encoded`: weights that are decoded when
    they are fetched. PlacementError if a link was not `measured`; if that does not matter, such a
    link takes no time.
    """
    compute = next(iter(freedom.rooms))
    places = places_of(freedom)
    known = freedom.weights
    index = {weight.name: i for i, weight in enumerate(known)}
    looked_up = rows_of(step)
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
        fits = weight.nbytes <= ring and weight.name not in encoded
        if rows and takes_rows(rows, weight.shape[0], whole=fits):
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
        uses.append((_rounded(seconds), [index[name] for name in use.weights if name in index]))
    return Problem(
        links, together, tiers, weights, uses, ring, bool(looked_up.keys() & index.keys())
    )


def places_of(freedom: Freedom) -> list[str]:
    """The compute device, and the donors that may hold anything."""
    compute, *donors = freedom.rooms
    used = [place for place in donors if freedom.rooms[place] > 0]
    return list(dict.fromkeys([compute, *used, *(device for _, device in freedom.ruled)]))


def rows_of(step: Step) -> dict[str, int]:
    """Weight -> rows that are looked up in it in one use, for tables that are not used whole."""
    found: dict[str, int] = {}
    whole = {name for use in step.uses for name in use.weights[1 if use.rows else 0 :]}
    for use in step.uses:
        if use.rows and use.weights and use.weights[0] not in whole:
            found[use.weights[0]] = max(use.rows, found.get(use.weights[0], 0))
    return found


def _links(
    donors: Sequence[str], rates: Rates, measured: bool
) -> tuple[list[tuple[float, float]], dict[str, int], float]:
    """(bytes per second, latency) of each link; place -> its link; bytes per second of all."""
    places = {place for donor in donors for place in donor.split("+")}
    if "disk" in places and rates.compute != "cpu":
        places.add("cpu")  # what was read goes on from host memory
    unknown = set() if measured else {place for place in places if not rates.knows(place)}
    if "cpu" in unknown:
        unknown |= places & {"disk"}
    places -= unknown
    links, groups = rates.links_for(places)
    numbers = [(rate, latency) for _, rate, latency, _ in links]
    found = {place: i for i, (place, *_) in enumerate(links)}
    if "disk" in places and rates.compute != "cpu":
        found["disk"] = len(numbers)
        numbers.append(rates.disk_for(places))
    for place in sorted(places - found.keys()):  # of a CPU that computes
        found[place] = len(numbers)
        numbers.append(rates.rate_and_latency(place))
    for place in sorted(unknown):
        found[place] = len(numbers)
        numbers.append((_BOUNDLESS, 0.0))
    known = [(_rounded(rate), _rounded(latency)) for rate, latency in numbers]
    return known, found, groups[0] if groups and not unknown else 0.0


def _rounded(measured: float) -> float:
    """Without the last digits, which differ between two measurements of the same: the placement
    shall not depend on them.
    """
    return float(f"{measured:.6g}")


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
