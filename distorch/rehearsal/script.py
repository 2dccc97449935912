# SPDX-License-Identifier: Apache-2.0
"""What a rehearsal needs (csrc/rehearsal): a model, a plan and a machine, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from distorch import _donors, _ops
from distorch.errors import PlacementError
from distorch.machine.calibration import Calibration, figures_of
from distorch.machine.links import known_links
from distorch.machine.rates import Rates
from distorch.machine.supposed import supposed
from distorch.planner import Plan, WeightInfo
from distorch.runtime import wrapped
from distorch.runtime.groups import Group, form_of, parts_of
from distorch.runtime.staging import packed_places, planned_place
from distorch.step import Step

_TABLE_SHARE = 4  # see csrc/hook/embedding.cpp
_PIECES = 1 << 32  # owners: from here on, pieces of memory that several weights share


class Piece(NamedTuple):
    """Consecutive bytes of a weight, and where they lie."""

    place: str
    nbytes: int
    owner: int
    address: int


class Weight(NamedTuple):
    """One piece of memory that is fetched as a whole."""

    name: str
    pieces: list[Piece]
    nbytes: int  # on the compute device
    encoded: bool
    in_place: bool
    decode_seconds: float


class Played(NamedTuple):
    """A `Use` as the rehearsal plays it: weights are indices."""

    seconds: float
    operators: int
    weights: list[int]
    copied: int
    host_waits: bool


class Table(NamedTuple):
    """What is known of a weight in which rows are looked up."""

    rows: int
    row_bytes: int  # on its donor


@dataclass
class Script:
    """The arguments of `_native.rehearse`, and the same step with nothing to fetch."""

    compute: str
    ring_bytes: int
    links: list[tuple[str, float, float, int]]
    groups: list[float]
    disk: tuple[float, float]
    readers: tuple[int, int]
    costs: tuple[float, float]
    weights: list[Weight]
    uses: list[Played]
    resident_uses: list[Played]  # with all weights on the compute device

    def arguments(self) -> dict[str, Any]:
        """By name."""
        return {name: value for name, value in vars(self).items() if name != "resident_uses"}

    def resident(self) -> Script:
        """The same step with nothing to fetch."""
        return replace(self, weights=[], uses=self.resident_uses)


def script_of(
    groups: Sequence[Group], plan: Plan, step: Step, ring_bytes: int, measured: Calibration
) -> Script:
    """The step as it would run with that plan and ring. PlacementError: a link was not measured.

    Weights that it does not use are there, too: the ring takes them to come until it knows better.
    """
    machine = Rates(plan.compute, measured)
    places = {group.name: planned_place(group, plan) for group in groups}
    fetched = _fetched(groups, places, machine, step)
    looked_up = {name for use in step.uses if use.rows for name in use.weights[:1]}
    tables = {
        group.name: Table(group.first.shape[0], _row(group))
        for group in groups
        if group.name in looked_up and group.name in fetched
    }
    return _script(fetched, tables, plan, step, ring_bytes, machine)


def script_of_sizes(
    weights: Sequence[WeightInfo], plan: Plan, step: Step, ring_bytes: int, measured: Calibration
) -> Script:
    """The same for weights of which only names and bytes are known, as of a file's."""
    machine = Rates(plan.compute, measured)
    fetched = {
        weight.name: [_plain(weight.name, weight.nbytes, place, owner, machine)]
        for owner, weight in enumerate(weights)
        if (place := plan.placement[weight.name]) != plan.compute
    }
    tables = {
        weight.name: Table(weight.shape[0], weight.nbytes // max(weight.shape[0], 1))
        for weight in weights
        if weight.name in fetched and weight.shape
    }
    return _script(fetched, tables, plan, step, ring_bytes, machine)


def _script(  # noqa: PLR0917
    fetched: Mapping[str, list[Weight]],
    tables: Mapping[str, Table],
    plan: Plan,
    step: Step,
    ring_bytes: int,
    machine: Rates,
) -> Script:
    weights = [weight for own in fetched.values() for weight in own]
    indices: dict[str, list[int]] = {}
    for index, weight in enumerate(weights):
        indices.setdefault(weight.name, []).append(index)
    uses, plain = list[Played](), list[Played]()
    looks_up = []  # the uses before which the host waits
    for use in step.uses:
        seconds = machine.without_issuing(use.seconds, use.idle)
        alone = Played(seconds, use.operators, [], use.copied, use.host_waits)
        plain.append(alone)
        names = [name for name in use.weights if name in indices]
        table = tables.get(names[0]) if use.rows and names else None
        if table is not None and takes_rows(
            use.rows, table.rows, whole=_fits_whole(fetched[names[0]][0], ring_bytes)
        ):
            looks_up.append(len(uses))
            place = plan.placement[names[0]]
            seconds = machine.row_seconds(place, use.rows * table.row_bytes)
            uses.append(alone._replace(seconds=seconds))
        else:
            uses.append(alone._replace(weights=[i for name in names for i in indices[name]]))
    for position in looks_up if plan.compute != "cpu" else ():
        # The host has to know which rows. Before the first use is the last one of another step.
        uses[position - 1] = uses[position - 1]._replace(host_waits=True)
    fetched_from = {piece.place for weight in weights for piece in weight.pieces}
    copied_from = {"cpu"} if any(use.copied for use in step.uses) else set()
    return Script(
        plan.compute, ring_bytes, *machine.links_for(fetched_from | copied_from),
        machine.disk_for(fetched_from), machine.readers(), machine.costs(), weights, uses, plain,
    )  # fmt: skip


def _fetched(
    groups: Sequence[Group], places: Mapping[str, str], machine: Rates, step: Step
) -> dict[str, list[Weight]]:
    """Name -> what a fetch brings, for all weights that operators do not use where they are."""
    in_ram = [group for group in groups if places[group.name] == "cpu"]
    packed = packed_places(in_ram, torch.device(machine.compute))
    found = {}
    for owner, group in enumerate(groups):
        own = _weights_of(group, places[group.name], owner, machine, step)
        if id(group) in packed and own and not own[0].encoded:
            piece, begin = packed[id(group)]  # its neighbours may travel with it
            own = [own[0]._replace(pieces=[Piece("cpu", own[0].nbytes, _PIECES + piece, begin)])]
        if own:
            found[group.name] = own
    return found


def _weights_of(
    group: Group,
    place: str,
    owner: int,
    machine: Rates,
    step: Step,
) -> list[Weight]:
    """What a fetch of this group brings; nothing if operators use it where it is."""
    first = group.first
    decoded = _ops.is_sharded(first) and _ops.state(first).decoded
    if not decoded and place == machine.compute:
        return []
    if decoded:
        state = _ops.state(first)
        nbytes = first.untyped_storage().nbytes()
        if machine.compute == "cpu":
            seconds = _decode_seconds_on_host(group.name, state.nbytes, step)
        else:
            seconds = machine.decode_seconds(
                state.nbytes, nbytes, state.factor_bytes, first.shape[0], nbytes // first.itemsize
            )
        pieces = [Piece(place, state.nbytes, owner, 0)]
        return [Weight(group.name, pieces, nbytes, True, state.nbytes == nbytes, seconds)]
    if wrapped.is_wrapper(first):
        parts = [part for part in parts_of(first) if not wrapped.stays(part)]
        sizes = [part.untyped_storage().nbytes() for part in parts]
        return [_plain(group.name, size, place, owner, machine) for size in sizes]
    return [_plain(group.name, group.nbytes, place, owner, machine)]


def _decode_seconds_on_host(name: str, stored: int, step: Step) -> float:
    """From what the step took for this weight, or for the others. PlacementError: for none."""
    if name not in step.weights:
        return 0.0
    if not step.decodes:
        raise PlacementError(
            f"how long {name!r} takes to decode is not known, since nothing was decoded in the "
            "step: the ring had all. Record it with a small one, such as prefetch='1mb'"
        )
    mean = sum(step.decodes.values()) / len(step.decodes)
    return step.decodes.get(name, mean) * stored


def _plain(name: str, nbytes: int, place: str, owner: int, machine: Rates) -> Weight:
    places = place.split("+")
    sizes = _donors.stripe_sizes(nbytes, places, machine.compute)
    pieces = [Piece(p, size, owner, 0) for p, size in zip(places, sizes, strict=True)]
    return Weight(name, pieces, nbytes, False, False, 0.0)


def _row(group: Group) -> int:
    """Bytes of a row of a table on its donor."""
    stored = _ops.state(group.first).nbytes if _ops.is_sharded(group.first) else group.nbytes
    return stored // max(group.first.shape[0], 1)


def takes_rows(rows: int, of: int, *, whole: bool) -> bool:
    """Whether only the rows that are asked for are brought, as csrc/hook/embedding.cpp decides.
    `whole`: the table would fit into the ring, as it is used.
    """
    return rows * _TABLE_SHARE < of and not whole


def _fits_whole(table: Weight, ring_bytes: int) -> bool:
    return not table.encoded and table.nbytes <= ring_bytes


def check_step_machine(step: Step) -> None:
    """PlacementError if the step was estimated for a device of another speed than the one that is
    to compute. (Links do not matter to a step.)
    """
    other = supposed()
    if not step.speed or (other is None and not step.machine):  # it was measured again, maybe
        return
    known = known_links()
    speed = known.speed(step.compute) if known is not None else None
    if speed is None or not all(map(_are_close, step.speed, figures_of(speed))):
        name = "this machine" if other is None else repr(other.name)
        raise PlacementError(
            f"the step was estimated for {step.compute!r} of {step.machine or 'this machine'!r}, "
            f"and {name} has another speed there; estimate it anew with distorch.estimate_step"
        )


def _are_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)


def check_step_fits(step: Step, groups: Sequence[Group], compute: str) -> None:
    """PlacementError unless the step is one of these weights on that device and machine."""
    if not step.uses:
        raise PlacementError(
            "the step is empty: run the model inside of the block of distorch.record_step, in the "
            "same thread"
        )
    check_step_machine(step)
    forms = {group.name: form_of(group.first) for group in groups}
    for name, form in step.forms.items():
        if forms.get(name) != form:
            there = f"has it as {forms[name]}" if name in forms else "does not have it"
            raise PlacementError(
                f"the step uses {name!r} ({form}), and this model {there}; record a step of this "
                "model with distorch.record_step"
            )
    if step.compute != compute:
        raise PlacementError(
            f"the step was recorded on {step.compute!r}, and the placement computes on "
            f"{compute!r}; record (or estimate) one there"
        )
