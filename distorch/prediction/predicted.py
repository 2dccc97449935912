# SPDX-License-Identifier: Apache-2.0
"""What a prediction says: the time of a step, who waits for what, and what binds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from distorch.display.picture import Picture
from distorch.display.tables import html_table, human_bytes, paragraphs, text_table
from distorch.planner import Plan
from distorch.timeline import Timeline

_HEADER = ("what", "busy ms", "of the step", "bytes", "GB/s")
_WAIT_HEADER = ("waits longest for", "ms")
_SHOWN = 5
_BINDS = 0.95  # what is busy for this part of a step is what the step takes that long for


@dataclass(frozen=True)
class LinkUse:
    """What a link does in a step: bytes that travel, and seconds in which any do."""

    bytes: int
    busy_seconds: float


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """What a step will take. It prints as a table, and `plot` draws the step.

    Attributes:
        plan: The placement that it is about.
        seconds: Of one step among several, once the order of weights is learned. The host runs
            ahead of the device, as it does if nothing reads the results in between.
        waited_seconds: The same if the host waits for the last operator of each step (`.item()`,
            `.cpu()`), as loops do that print a number of each. Copies may then be asked for later.
        first_seconds: Of the first step.
        compute_seconds: Of a step with all weights resident.
        bound_seconds: No placement within the same budgets makes a step faster, if each weight that
            is not resident travels once in a step. (With `plan=` or as placed now: within the bytes
            that the plan has on each device.)
        busy_seconds: In which the compute device computes or decodes.
        stalls: Weight -> seconds of such a step that operators wait for it; only those that wait.
        links: "cpu->cuda:0", or "disk" -> a `LinkUse` (bytes, busy_seconds) of one step.
        ring_bytes: Bytes of look-ahead on the compute device, beyond its share.
        overflows: How many fetches of one step find no room in the ring. They wait for their copy.
        timeline: What runs when in one step.
    """

    plan: Plan
    seconds: float
    waited_seconds: float
    first_seconds: float
    compute_seconds: float
    bound_seconds: float
    busy_seconds: float
    stalls: dict[str, float]
    links: dict[str, LinkUse]
    ring_bytes: int
    overflows: float
    timeline: Timeline

    @property
    def binds(self) -> str:
        """Why the step is not faster: "compute", or a link such as "cpu->cuda:0", or "disk", which
        is busy all the time. "host": the device waits for the host to issue operators. "ring": none
        of them, because look-ahead has too little memory, or because the weights that travel follow
        each other too closely.
        """
        full = _BINDS * self.seconds
        if self.busy_seconds >= full:
            return "compute"
        busiest = max(self.links, key=lambda name: self.links[name].busy_seconds, default="")
        if busiest and self.links[busiest].busy_seconds >= full:
            return busiest
        host = self.plan.compute != "cpu" and self.compute_seconds >= full
        return "host" if host else "ring"

    @property
    def gap(self) -> float:
        """By which part the step is longer than `bound_seconds`: 0.05 is 5 %."""
        return self.seconds / self.bound_seconds - 1 if self.bound_seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON types."""
        return {
            "seconds": self.seconds,
            "waited_seconds": self.waited_seconds,
            "first_seconds": self.first_seconds,
            "compute_seconds": self.compute_seconds,
            "bound_seconds": self.bound_seconds,
            "busy_seconds": self.busy_seconds,
            "binds": self.binds,
            "stalls": dict(self.stalls),
            "links": {name: dict(use.__dict__) for name, use in self.links.items()},
            "ring_bytes": self.ring_bytes,
            "overflows": self.overflows,
            "spec": self.plan.spec,
            "plan": self.plan.hash,
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """The step as a picture: a row for each track, milliseconds to the right.

        With a `path` it is also saved there, with the errors of `Picture.save`.
        """
        return self.timeline.plot(path)

    def _rows(self) -> list[tuple[str, ...]]:
        def row(what: str, seconds: float, nbytes: int = 0) -> tuple[str, ...]:
            share = f"{100 * seconds / max(self.seconds, 1e-12):.1f}%"
            rate = f"{nbytes / max(seconds, 1e-12) / 1e9:.2f}" if nbytes else ""
            return what, f"{seconds * 1e3:.3f}", share, human_bytes(nbytes) if nbytes else "", rate

        return [
            row(self.plan.compute, self.busy_seconds),
            *(row(name, use.busy_seconds, use.bytes) for name, use in self.links.items()),
            row("waiting for weights", sum(self.stalls.values())),
        ]

    def _longest(self) -> list[tuple[str, str]]:
        longest = sorted(self.stalls.items(), key=lambda item: -item[1])[:_SHOWN]
        return [(name, f"{seconds * 1e3:.3f}") for name, seconds in longest]

    def _title(self) -> str:
        words = {
            "compute": f"{self.plan.compute} is busy all the time",
            "host": f"{self.plan.compute} waits for the host to issue operators",
            "ring": (
                "nothing is busy all the time: look-ahead has too little memory (prefetch), or the "
                "weights that travel follow each other too closely"
            ),
        }
        why = words.get(self.binds, f"{self.binds} is busy all the time")
        return (
            f"{self.plan.spec!r}: a step takes {self.seconds * 1e3:.3f} ms (the first one "
            f"{self.first_seconds * 1e3:.3f} ms), {self.compute_seconds * 1e3:.3f} ms with "
            f"all weights resident; {why}"
        )

    def _notes(self) -> list[str]:
        if self.overflows < 0.5:
            return []
        return [
            f"{self.overflows:.0f} fetches of a step find no room in the ring "
            f"({human_bytes(self.ring_bytes)}): a larger prefetch= helps"
        ]

    def __str__(self) -> str:
        table = text_table(_HEADER, self._rows(), self._title())
        longest = self._longest()
        waits = text_table(_WAIT_HEADER, longest) if longest else ""
        return "\n".join(part for part in (table, waits, *self._notes()) if part)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        longest = self._longest()
        return (
            html_table(_HEADER, self._rows(), self._title())
            + (html_table(_WAIT_HEADER, longest) if longest else "")
            + paragraphs(self._notes())
            + self.plot().svg()
        )
