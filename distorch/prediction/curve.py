# SPDX-License-Identifier: Apache-2.0
"""What more memory is worth: the time of a step against the bytes that one device may hold."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from typing_extensions import Unpack

from distorch.display.curves import curve_picture
from distorch.display.picture import Picture
from distorch.display.progress import Progress, progress_of
from distorch.display.tables import html_table, human_bytes, paragraphs, text_table
from distorch.errors import PlacementError, SpecError
from distorch.machine.profiles import Machine, machine_of
from distorch.machine.supposed import supposing
from distorch.planner import Plan, parse_bytes, shares_of
from distorch.prediction.predict import predict
from distorch.runtime.changes import alone
from distorch.runtime.distribution import distribution_of, inventory_now
from distorch.runtime.groups import group_members
from distorch.runtime.options import OptionsOfStep, check_module
from distorch.runtime.planning import Wish, devices_for
from distorch.step import Step

_HEADER = ("bytes", "size", "ms of a step", "")
_GIB = 1 << 30
# A corner of the curve is a knee if it bends there by this part of the steepest slope.
_BEND = 0.25


@dataclass(frozen=True, repr=False, eq=False)
class Curve:
    """Seconds of a step against bytes on one device. It prints as a table.

    Attributes:
        device: Whose bytes these are.
        spec: The placement in which they vary.
        points: (bytes on the device, seconds of a step), by bytes.
        here: Bytes that the device has with `spec` itself.
        resident_seconds: Seconds of a step with all weights on the compute device.
        skipped: Why some of the amounts are missing: the first reason.
    """

    device: str
    spec: str
    points: tuple[tuple[int, float], ...]
    here: int
    resident_seconds: float
    skipped: tuple[str, ...] = ()

    @property
    def knees(self) -> tuple[tuple[int, float], ...]:
        """The points at which more memory begins to be worth less, by bytes."""
        hull: list[tuple[int, float]] = []
        for point in self.points:
            while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        slopes = [_slope(a, b) for a, b in pairwise(hull)]
        steepest = max(map(abs, slopes), default=0.0)
        return tuple(
            point
            for point, before, after in zip(hull[1:-1], slopes, slopes[1:], strict=False)
            if steepest and after - before >= _BEND * steepest
        )

    def at(self, nbytes: int | str) -> float:
        """Seconds of a step with so many bytes ("4gb") on the device, between two points by their
        distance. Beyond the first and the last point: as there.

        Raises:
            SpecError: `nbytes` is no number of bytes.
        """
        wanted = parse_bytes(nbytes)
        index = bisect_right([known for known, _ in self.points], wanted)
        if index == 0:
            return self.points[0][1]
        if index == len(self.points):
            return self.points[-1][1]
        (low, before), (high, after) = self.points[index - 1 : index + 1]
        return before + (after - before) * (wanted - low) / (high - low)

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON types."""
        return {
            "device": self.device,
            "spec": self.spec,
            "points": [list(point) for point in self.points],
            "knees": [list(point) for point in self.knees],
            "here": self.here,
            "resident_seconds": self.resident_seconds,
            "skipped": list(self.skipped),
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """A column for each point, with the knees marked.

        With a `path` it is also saved there, with the errors of `Picture.save`.
        """
        marks = {nbytes: "knee" for nbytes, _ in self.knees}
        marks |= {self.here: "here"} if self.here not in marks else {self.here: "here, knee"}
        made = curve_picture(
            f"{self.spec}   (predicted)", self.points, self.resident_seconds,
            marks=marks, label=f"bytes of weights on {self.device}", notes=self._notes(),
        )  # fmt: skip
        return made if path is None else made.saved(path)

    def _notes(self) -> list[str]:
        """What a little more and a little less would change."""
        first, last = self.points[0][0], self.points[-1][0]
        amount = min(_GIB, max((last - first) // 8, 1))
        notes = []
        if self.here < last:
            more = min(amount, last - self.here)
            saved = self.at(self.here) - self.at(self.here + more)
            notes.append(f"+{human_bytes(more)} on {self.device} {_worth(saved)}")
        if self.here > first:
            less = min(amount, self.here - first)
            lost = self.at(self.here - less) - self.at(self.here)
            notes.append(f"-{human_bytes(less)} on {self.device} {_worth(-lost)}")
        return [*notes, *(f"some amounts cannot be had: {reason}" for reason in self.skipped)]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        knees = {nbytes for nbytes, _ in self.knees}
        rows = []
        for nbytes, seconds in self.points:
            marks = ["here"] * (nbytes == self.here) + ["knee"] * (nbytes in knees)
            rows.append(
                (str(nbytes), human_bytes(nbytes), f"{seconds * 1e3:.3f}", ", ".join(marks))
            )
        return rows

    def _title(self) -> str:
        return f"{self.spec!r}: a step against the bytes of weights on {self.device}"

    def __str__(self) -> str:
        return "\n".join([text_table(_HEADER, self._rows(), self._title()), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(_HEADER, self._rows(), self._title())
        return table + paragraphs(self._notes()) + self.plot().svg()


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _worth(saved: float) -> str:
    if abs(saved) < 5e-7:
        return "changes nothing"
    return f"{'saves' if saved >= 0 else 'costs'} {abs(saved) * 1e3:.3f} ms"


def curve(
    module: nn.Module,
    step: Step,
    spec: str | None = None,
    *,
    device: str | None = None,
    points: int = 17,
    progress: Progress = None,
    machine: Machine | str | os.PathLike[str] | None = None,
    **options: Unpack[OptionsOfStep],
) -> Curve:
    """Predicts a step for many amounts of memory on one device. Nothing moves.

    It shows what one more gigabyte would save, and from where on more memory is worth little.

    Args:
        module: A module. It need not be distributed if a placement is given.
        step: What a step of this module does, from `record_step` or `Step.load`.
        spec: A placement string. The shares of all devices but one are as it says; what has no
            place there goes to the entry that takes the rest, or to the last donor. If not given:
            the placement of the module now.
        device: Whose share varies. If not given: the compute device's, from nothing but what must
            stay there to the whole model.
        points: How many amounts are tried, from 2 to 200.
        progress: As in `distribute`. A function is called with the number of points that are done.
        machine: Another machine than this one, as in `predict`.
        options: Those of `distribute`. Those that are not given are as they are now.

    Returns:
        A `Curve`.

    Raises:
        SpecError: An argument is wrong.
        FormatError, PlacementError: As in `predict`.
    """
    check_module(module)
    if isinstance(points, bool) or not isinstance(points, int) or not 2 <= points <= 200:
        raise SpecError(f"points={points!r}: expected a number from 2 to 200")
    if spec is None:
        spec = distribution_of(module).plan.spec
    there = machine_of(machine)
    first = predict(module, step, spec, machine=there, **options)
    with supposing(there):
        shares = _Shares(module, first.plan, device)
    here = first.plan.bytes[shares.device]
    found, problems = {here: first.seconds}, list[PlacementError]()
    with progress_of(progress, points, "predicting", "placements") as done:
        for nbytes in shares.amounts(points):
            try:
                own = predict(module, step, shares.spec_with(nbytes), machine=there, **options)
            except PlacementError as error:  # the other devices do not hold the rest
                problems.append(error)
            else:
                held = own.plan.bytes.get(shares.device, 0)
                found[held] = min(own.seconds, found.get(held, own.seconds))
            done(1)
    if problems and len(found) < 2:
        raise problems[0]
    skipped = [str(problems[0])] if problems else []
    known = tuple(sorted(found.items()))
    return Curve(shares.device, spec, known, here, first.compute_seconds, tuple(skipped))


class _Shares:
    """The placements of a curve."""

    def __init__(self, module: nn.Module, plan: Plan, device: str | None) -> None:
        self.device = plan.compute if device is None else device
        held = plan.bytes
        if self.device not in held:
            raise SpecError(
                f"device={device!r}: expected one that has weights with {plan.spec!r}, such as "
                f"{', '.join(map(repr, held))}"
            )
        with alone(module, nested=True):
            groups = group_members(module)
            inventory = inventory_now(module, groups)
            wish = Wish.of(plan.spec, plan.compute, devices_for(groups, module))
        shares = shares_of(inventory, wish.spec, **wish.arguments())
        others = {place: share for place, share in shares.items() if place != self.device}
        if self.device != plan.compute:  # what computes keeps what it has
            others[plan.compute] = held[plan.compute]
        donors = [place for place in others if place != plan.compute]
        if not donors:  # somebody has to take what the device gives away
            donors = ["disk" if "cpu" in (plan.compute, self.device) else "cpu"]
        opened = [place for place in donors if others.get(place) is None]
        self._rest = (opened or donors)[-1]
        self._others = {
            place: held.get(place, 0) if share is None else share
            for place, share in others.items()
            if place != self._rest
        }
        most = inventory.total_bytes
        if self.device == plan.compute:
            self._least, self._most = plan.floor, most
        else:
            self._least, self._most = 0, most - held[plan.compute]

    def amounts(self, points: int) -> Iterable[int]:
        """Bytes for the device, evenly spaced."""
        span = self._most - self._least
        return (self._least + span * i // (points - 1) for i in range(points))

    def spec_with(self, nbytes: int) -> str:
        """The placement in which the device has so many bytes at most."""
        others = [f"{place},{share}b" for place, share in self._others.items()]
        return ";".join([f"{self.device},{nbytes}b", *others, f"{self._rest},*"])
